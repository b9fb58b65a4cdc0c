"""Loads plugins one by one through pluggy, isolates broken ones, and records which plugin provides which component."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pluggy

from backdoor_bench_none.contracts.markers import PROJECT
from backdoor_bench_none.registry import hookspecs
from backdoor_bench_none.system import keep_working_directory
from backdoor_bench_none.words import describe_error

if TYPE_CHECKING:
    from backdoor_bench_none.contracts.cell import Cell
    from backdoor_bench_none.contracts.config import Config
    from backdoor_bench_none.contracts.record import Record

#: The version of `backdoor_bench_none.api`; a plugin names the version it was written for in `bbn_api_version`.
API_VERSION = 2
#: older version -> what has changed since, with which a plugin for that version is refused
CHANGES = {
    1: "every method that does work now takes (task, context), and everything is imported from "
    "backdoor_bench_none.api; see 'Changes of the API' in docs/api.md, then set bbn_api_version = 2",
}
#: Built-in plugins, registered by import name, so that a checkout works without being installed.
BUILTINS = ("backdoor_bench_none.registry.builtin", "backdoor_bench_none.loggers", "bbn_attacks", "bbn_defenses")


@dataclass(frozen=True)
class Provider:
    """The plugin that provides a component, its distribution, and the version of that."""

    plugin: str
    distribution: str
    version: str
    builtin: bool = False

    def __str__(self) -> str:
        return f"'{self.plugin}' ({self.distribution} {self.version})"


@dataclass(frozen=True)
class Broken:
    """A plugin that is not in use, or not in all parts, with the reason."""

    provider: Provider
    reason: str


@dataclass(frozen=True)
class Entry:
    """A component of a plugin; `target` is the class, or a `"module:Class"` string that is imported on use."""

    kind: str
    name: str
    target: type[Any] | str
    provider: Provider

    def load(self) -> Any:  # noqa: ANN401
        """The class or the command."""
        if not isinstance(self.target, str):
            return self.target
        module, _, attribute = self.target.partition(":")
        return getattr(importlib.import_module(module), attribute)


class PluginWarning(UserWarning):
    """A plugin is broken, or one of its hooks raised; all others are in use."""


class Plugins:
    """All plugins of this process: the built-ins, installed distributions, and a `bbnfile.py`.

    :param external: load the installed plugins of the entry-point group `backdoor_bench_none`.
    :param bbnfile: a Python file that is loaded as a plugin, usually `bbnfile.py` beside `benchmark.yaml`.
    :param disabled: names of plugins or distributions to leave out; default: `BBN_DISABLE_PLUGINS`, comma-separated.
    """

    def __init__(
        self, *, external: bool = True, bbnfile: Path | None = None, disabled: Iterable[str] | None = None
    ) -> None:
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self.external = external
        self.bbnfile = bbnfile
        self.providers: list[Provider] = []
        self.broken: list[Broken] = []
        self.entries: list[Entry] = []
        if disabled is None:
            disabled = filter(None, os.environ.get("BBN_DISABLE_PLUGINS", "").split(","))
        self.disabled = frozenset(name.strip() for name in disabled)
        for module in BUILTINS:
            self._add(_own_provider(module), partial(importlib.import_module, module))
        if external:
            for point in _external_points():
                self._add(_provider_of(point), point.load)
        if bbnfile is not None:
            self._add(Provider("bbnfile", str(bbnfile), "-"), lambda: _import_file(bbnfile))

    def _add(self, provider: Provider, load: Callable[[], Any]) -> None:
        if {provider.plugin, provider.distribution} & self.disabled and not provider.builtin:
            return
        module = None
        try:
            with keep_working_directory():
                module = load()
            _check_api_version(module)
            self._register(module, provider.plugin)
            entries = list(self._entries_of(provider))
        except (Exception, SystemExit) as error:  # third-party code may raise anything
            if provider.builtin:
                raise
            self._drop(provider, module, describe_import_error(error))
            return
        self.providers.append(provider)
        for entry in entries:
            self._add_entry(entry)

    def _register(self, module: object, name: str) -> None:
        self._manager.register(module, name=name)
        self._manager.check_pending()
        for caller in self._manager.get_hookcallers(module) or ():
            if any(i.plugin is module and (i.wrapper or i.hookwrapper) for i in caller.get_hookimpls()):
                raise TypeError(f"{caller.name} is a wrapper; hooks are called one by one here and cannot be wrapped")

    def _drop(self, provider: Provider, module: object, reason: str) -> None:
        if module is not None and self._manager.is_registered(module):
            self._manager.unregister(module)
        self.broken.append(Broken(provider, reason))
        warnings.warn(f"plugin {provider} is not loaded: {reason}", PluginWarning, stacklevel=4)

    def _entries_of(self, provider: Provider) -> Iterator[Entry]:
        for hook, kind in hookspecs.NAMING_HOOKS.items():
            for implementation in getattr(self._manager.hook, hook).get_hookimpls():
                if implementation.plugin_name != provider.plugin:
                    continue
                provided = implementation.function()
                if not isinstance(provided, Mapping):
                    raise TypeError(f"{hook} returned {type(provided).__name__}, not a mapping of names to classes")
                for name, target in provided.items():
                    _check_target(hook, kind, name, target)
                    yield Entry(kind, name, target, provider)

    def _add_entry(self, entry: Entry) -> None:
        """Keep `entry` unless a built-in component has its name.

        Equal names of two third-party plugins are both kept, and refused on use.
        """
        taken = next((e.provider for e in self.entries if (e.kind, e.name) == (entry.kind, entry.name)), None)
        if taken is not None:
            remedy = f"BBN_DISABLE_PLUGINS={entry.provider.plugin} leaves this one out"
            reason = f"{entry.kind} '{entry.name}' is provided by {taken} too; {remedy}"
            self.broken.append(Broken(entry.provider, reason))
            warnings.warn(f"plugin {entry.provider}: {reason}", PluginWarning, stacklevel=5)
            if taken.builtin:
                return
        self.entries.append(entry)

    # The lifecycle hooks, with types; an exception of a plugin becomes a warning.

    def modify_plan(self, config: Config, cells: list[Cell]) -> None:
        """Call every plugin to reorder, drop or add cells in place."""
        for _ in self._each("bbn_modify_plan", config=config, cells=cells):
            pass

    def cell_skip(self, cell: Cell) -> str | None:
        """The first reason that a plugin gives to skip `cell`; None if there is none."""
        return next((reason for reason in self._each("bbn_cell_skip", cell=cell) if reason is not None), None)

    def cell_finished(self, cell: Cell, record: Record) -> None:
        """Call every plugin with a cell that ended, and its record."""
        for _ in self._each("bbn_cell_finished", cell=cell, record=record):
            pass

    def _each(self, hook: str, **arguments: Any) -> Iterator[Any]:
        for implementation in reversed(getattr(self._manager.hook, hook).get_hookimpls()):
            try:
                yield implementation.function(*(arguments[name] for name in implementation.argnames))
            except (Exception, SystemExit) as error:
                message = f"plugin '{implementation.plugin_name}': {hook} raised {describe_error(error)}"
                warnings.warn(message, PluginWarning, stacklevel=3)


def describe_import_error(error: BaseException) -> str:
    """The error of an import in one line, with the text of `CHANGES` if a module of this package is missing."""
    text = describe_error(error)
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == PROJECT:
        return f"{text}: it was written for an older version of the API: {CHANGES[1]}"
    return text


def _check_target(hook: str, kind: str, name: object, target: object) -> None:
    """Raise `TypeError` if a naming hook returned a name or a target of a wrong type."""
    if not isinstance(name, str):
        raise TypeError(f"{hook}: the name {name!r} is not a string")
    is_class = isinstance(target, type) and kind != "command"
    if not isinstance(target, str) and not is_class:
        raise TypeError(f"{hook}: '{name}' is neither a class nor a 'module:Class' string")


def _check_api_version(module: object) -> None:
    """Raise `RuntimeError` with the remedy if a plugin was written for another version of the API."""
    wanted: int = getattr(module, "bbn_api_version", API_VERSION)
    if wanted > API_VERSION:
        raise RuntimeError(
            f"it needs plugin API {wanted}, this is {API_VERSION}; a newer backdoor-bench-none may have it"
        )
    if wanted < API_VERSION:
        changes = "; ".join(CHANGES[version] for version in range(max(1, wanted), API_VERSION))
        raise RuntimeError(f"it was written for plugin API {wanted}, this is {API_VERSION}: {changes}")


def _own_provider(module: str) -> Provider:
    return Provider(module, "backdoor-bench-none", own_version(), builtin=True)


def own_version() -> str:
    """The version of this distribution; `0+checkout` if it is not installed."""
    try:
        return version("backdoor-bench-none")
    except PackageNotFoundError:
        return "0+checkout"


def _external_points() -> list[EntryPoint]:
    return sorted(entry_points(group=PROJECT), key=lambda point: point.name)


def _provider_of(point: EntryPoint) -> Provider:
    if point.dist is None:
        return Provider(point.name, point.value, "?")
    return Provider(point.name, point.dist.name, point.dist.version)


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("bbnfile", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules["bbnfile"] = module  # pydantic resolves annotations through it
    spec.loader.exec_module(module)
    return module
