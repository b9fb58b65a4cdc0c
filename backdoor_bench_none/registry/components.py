"""From a kind and a name to the class behind it, and to an instance with validated parameters."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from backdoor_bench_none.contracts.component import Component
from backdoor_bench_none.errors import ConfigError, PluginError, did_you_mean
from backdoor_bench_none.registry.plugins import Entry, Plugins, describe_import_error

C = TypeVar("C", bound=Component)


class Registry:
    """Every component by kind and name."""

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
        """The one entry of that name; an error if there is none, or more than one."""
        found = [entry for entry in self.plugins.entries if (entry.kind, entry.name) == (kind, name)]
        if not found:
            raise ConfigError(f"unknown {kind} '{name}'", did_you_mean(name, self.names(kind)))
        if len(found) > 1:
            providers = " and ".join(str(entry.provider) for entry in found)
            hint = f"BBN_DISABLE_PLUGINS={found[-1].provider.plugin} leaves the last one out"
            raise PluginError(f"{kind} '{name}' is provided by {providers}", hint)
        return found[0]

    def find(self, name: str) -> list[Entry]:
        """The entries of that name, of any kind."""
        components = [entry for entry in self.plugins.entries if entry.kind != "command"]
        found = [entry for entry in components if entry.name == name]
        if not found:
            raise ConfigError(f"unknown component '{name}'", did_you_mean(name, {e.name for e in components}))
        return found

    def load(self, kind: str, name: str) -> type[Component]:
        """The class behind a name, checked to be a component of that kind."""
        from backdoor_bench_none.contracts.kinds import BASES

        return self.load_as(BASES[kind], name)

    def load_as(self, base: type[C], name: str) -> type[C]:
        """As `load`, for the kind whose base class is `base`."""
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
        """An instance with `params`; parameter faults become one `ConfigError` that names them all."""
        from backdoor_bench_none.contracts.kinds import BASES

        return self.create_as(BASES[kind], name, params)

    def create_as(self, base: type[C], name: str, params: Mapping[str, Any] | None = None) -> C:
        """As `create`, for the kind whose base class is `base`."""
        loaded, kind = self.load_as(base, name), kind_of(base)
        try:
            return loaded(**(params or {}))
        except ValidationError as error:
            faults = "; ".join(f"{path}: {message}" for path, message in explain(error, loaded))
            raise ConfigError(f"{kind} '{name}': {faults}", _parameters_hint(loaded)) from error


def kind_of(base: type[Component]) -> str:
    """The kind whose base class is `base`, or a base of it; `TypeError` if it is no component."""
    from backdoor_bench_none.contracts.kinds import BASES

    for kind, known in BASES.items():
        if issubclass(base, known):
            return kind
    raise TypeError(f"{base.__name__} is no component; subclass one of {', '.join(sorted(BASES))}")


def find_old_signature(component: type[Component], base: type[Component]) -> str | None:
    """The name of the first method of a component that cannot be called as its base class declares it, with what it
    works on and a context.
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
    """What `entry` names; `PluginError` with the guilty plugin if it cannot be imported."""
    try:
        return entry.load()
    except (Exception, SystemExit) as error:  # whatever a stranger's module does on import
        what = f"{entry.kind} '{entry.name}' of plugin {entry.provider} cannot be imported"
        raise PluginError(f"{what}: {describe_import_error(error)}", _remedy(entry)) from error


def _remedy(entry: Entry) -> str:
    return f"update it, or leave it out with BBN_DISABLE_PLUGINS={entry.provider.plugin}"


def explain(error: ValidationError, model: type[Any]) -> list[tuple[str, str]]:
    """Pydantic's faults as (dotted path, plain words)."""
    return [
        (".".join(str(part) for part in fault["loc"]) or "-", plain_words(fault, model)) for fault in error.errors()
    ]


def plain_words(fault: Mapping[str, Any], model: type[Any]) -> str:
    """One pydantic fault in the words of a user: unknown keys get a suggestion."""
    if fault["type"] != "extra_forbidden":
        message: str = fault["msg"]
        return message.removeprefix("Value error, ")
    known = getattr(model, "model_fields", {}) if len(fault["loc"]) == 1 else {}
    suggestion = f", {did_you_mean(str(fault['loc'][-1]), known)}" if known else ""
    return f"unknown key{suggestion}"


def _parameters_hint(component: type[Component]) -> str:
    return f"parameters: {', '.join(component.model_fields) or 'none'}"
