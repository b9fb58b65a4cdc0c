"""Looks up components by kind and name, and makes instances with validated parameters."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from backdoor_bench_none.contracts.component import Component
from backdoor_bench_none.errors import ConfigError, PluginError, did_you_mean
from backdoor_bench_none.registry.plugins import Entry, Plugins, describe_import_error
from backdoor_bench_none.system import keep_working_directory

C = TypeVar("C", bound=Component)
#: a part of pydantic's location that names the member of a union it tried
UNION_PART = re.compile(r"(constrained-)?(str|int|float|bool|dict)$|.*\[")


class Registry:
    """All components by kind and name."""

    def __init__(self, plugins: Plugins) -> None:
        self.plugins = plugins

    @classmethod
    def default(cls, folder: Path | None = None) -> Registry:
        """The built-ins, the installed plugins, and the `bbnfile.py` of `folder` if there is one."""
        bbnfile = (folder or Path(os.curdir)) / "bbnfile.py"
        return cls(Plugins(bbnfile=bbnfile if bbnfile.is_file() else None))

    def names(self, kind: str) -> list[str]:
        """The names of all components of `kind`, built-ins first."""
        return list(dict.fromkeys(entry.name for entry in self.plugins.entries if entry.kind == kind))

    def entry(self, kind: str, name: str) -> Entry:
        """The entry with that kind and name; an error if there is none, or more than one."""
        matches = [entry for entry in self.plugins.entries if (entry.kind, entry.name) == (kind, name)]
        if not matches:
            raise ConfigError(f"unknown {kind} '{name}'", did_you_mean(name, self.names(kind)))
        if len(matches) > 1:
            providers = " and ".join(str(entry.provider) for entry in matches)
            hint = f"BBN_DISABLE_PLUGINS={matches[-1].provider.plugin} leaves the last one out"
            raise PluginError(f"{kind} '{name}' is provided by {providers}", hint)
        return matches[0]

    def find(self, name: str) -> list[Entry]:
        """All entries with that name, of any kind but commands; `ConfigError` if there is none."""
        components = [entry for entry in self.plugins.entries if entry.kind != "command"]
        matches = [entry for entry in components if entry.name == name]
        if not matches:
            raise ConfigError(f"unknown component '{name}'", did_you_mean(name, {e.name for e in components}))
        return matches

    def load(self, kind: str, name: str) -> type[Component]:
        """The class with that kind and name; `PluginError` if it is not a component of that kind."""
        return self.load_as(self._base_of(kind, name), name)

    def load_as(self, base: type[C], name: str) -> type[C]:
        """The class with that name and the kind of the base class `base`; see `load`."""
        kind = kind_of(base)
        entry = self.entry(kind, name)
        loaded = import_target(entry)
        if not (isinstance(loaded, type) and issubclass(loaded, base)):
            raise PluginError(
                f"{kind} '{name}' of plugin {entry.provider} is not a subclass of {base.__name__}",
                _remedy(entry),
            )
        if (method := find_old_signature(loaded, base)) is not None:
            raise PluginError(
                f"{kind} '{name}' of plugin {entry.provider}: {method} does not take (task, context), as it must since "
                "version 2 of the API",
                "see 'Changes of the API' in docs/api.md; " + _remedy(entry),
            )
        return loaded

    def create(self, kind: str, name: str, params: Mapping[str, Any] | None = None) -> Component:
        """An instance with `params`; `ConfigError` lists all faults of parameters."""
        return self.create_as(self._base_of(kind, name), name, params)

    def create_as(self, base: type[C], name: str, params: Mapping[str, Any] | None = None) -> C:
        """An instance of the kind of the base class `base`; see `create`."""
        loaded, kind = self.load_as(base, name), kind_of(base)
        try:
            return loaded(**(params or {}))
        except ValidationError as error:
            faults = "; ".join(f"{path}: {message}" for path, message in explain(error, loaded))
            raise ConfigError(f"{kind} '{name}': {faults}", _parameters_hint(loaded)) from error

    def _base_of(self, kind: str, name: str) -> type[Component]:
        """The base class of a kind; `ConfigError` if the kind has no component with that name."""
        from backdoor_bench_none.contracts.kinds import BASES

        self.entry(kind, name)  # first, since an unknown kind is not in BASES either
        return BASES[kind]


def kind_of(base: type[Component]) -> str:
    """The kind whose base class `base` is, or is derived from; `TypeError` if it is not a component."""
    from backdoor_bench_none.contracts.kinds import BASES

    for kind, known in BASES.items():
        if issubclass(base, known):
            return kind
    raise TypeError(f"{base.__name__} is not a component; subclass one of {', '.join(sorted(BASES))}")


@cache
def find_old_signature(component: type[Component], base: type[Component]) -> str | None:
    """The name of the first method of a component that cannot be called with `(task, context)`, as its base declares.

    None if all can.
    """
    for name, declared in vars(base).items():
        if not inspect.isfunction(declared) or list(inspect.signature(declared).parameters)[2:] != ["context"]:
            continue
        try:
            inspect.signature(getattr(component, name)).bind("self", "task", "context")
        except (TypeError, ValueError):
            return name
    return None


def import_target(entry: Entry) -> Any:  # noqa: ANN401
    """The class or command of an entry; `PluginError` with the name of the plugin if it cannot be imported."""
    try:
        with keep_working_directory():
            return entry.load()
    except (Exception, SystemExit) as error:  # third-party code may raise anything
        what = f"{entry.kind} '{entry.name}' of plugin {entry.provider} cannot be imported"
        raise PluginError(f"{what}: {describe_import_error(error)}", _remedy(entry)) from error


def _remedy(entry: Entry) -> str:
    return f"update it, or leave it out with BBN_DISABLE_PLUGINS={entry.provider.plugin}"


def explain(error: ValidationError, model: type[Any]) -> list[tuple[str, str]]:
    """The faults of a validation as (dotted path, message)."""
    return [
        (".".join(map(str, without_union_parts(fault["loc"]))) or "-", plain_words(fault, model))
        for fault in error.errors()
    ]


def without_union_parts(location: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """A location of pydantic's without the members of unions that it tried: types, and parts in brackets."""
    return tuple(part for part in location if not (isinstance(part, str) and UNION_PART.match(part)))


def plain_words(fault: Mapping[str, Any], model: type[Any]) -> str:
    """The message of a fault, with a suggestion for an unknown key."""
    if fault["type"] != "extra_forbidden":
        message: str = fault["msg"]
        return message.removeprefix("Value error, ")
    known = getattr(model, "model_fields", {})
    if not known or len(fault["loc"]) > 1:  # a key of a nested model, whose fields are not known here
        return "unknown key"
    return f"unknown key, {did_you_mean(str(fault['loc'][0]), known)}"


def _parameters_hint(component: type[Component]) -> str:
    return f"parameters: {', '.join(component.model_fields) or 'none'}"
