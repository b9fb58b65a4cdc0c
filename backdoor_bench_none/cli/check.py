"""The verb `bbn check`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from backdoor_bench_none.cli.options import open_registry
from backdoor_bench_none.cli.output import say
from backdoor_bench_none.errors import BenchError, ConfigError, ExitCode, PluginError, did_you_mean
from backdoor_bench_none.words import plural

if TYPE_CHECKING:
    from backdoor_bench_none.contracts.component import Component
    from backdoor_bench_none.registry.components import Registry
    from backdoor_bench_none.registry.plugins import Entry, Plugins


@click.command("check")
@click.argument("plugin")
@click.argument("components", nargs=-1, metavar="[COMPONENT]...")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("-v", "--verbose", is_flag=True, help="Print every check.")
def check_command(plugin: str, components: tuple[str, ...], device: str, verbose: bool) -> int:
    """Check that the components of PLUGIN meet their contract, with default parameters on tiny data.

    PLUGIN is the name of a distribution or of a plugin (`bbn list plugins`), or bbnfile. The exit code is 1 if a check
    fails.
    """
    from backdoor_bench_none.contracts.context import choose_device

    choose_device(device)
    registry = open_registry(None)
    failed = 0
    entries = find_entries(registry.plugins, plugin, components)
    for entry in entries:
        failed += check_entry(entry, registry, device, verbose)
    if failed:
        say(f"{plural('component', len(entries))} of {plugin}, {plural('check', failed)} failed")
        return ExitCode.CELLS_FAILED
    say("all checks passed")
    return ExitCode.OK


def find_entries(plugins: Plugins, name: str, components: tuple[str, ...]) -> list[Entry]:
    """The components of a plugin or distribution.

    `PluginError` if it is broken, `ConfigError` if there is no such plugin or component.
    """
    for broken in plugins.broken:
        if name in (broken.provider.plugin, broken.provider.distribution):
            raise PluginError(f"plugin {broken.provider} is not in use: {broken.reason}")
    providers = [p for p in plugins.providers if name in (p.plugin, p.distribution)]
    if not providers:
        known = {p.plugin for p in plugins.providers} | {p.distribution for p in plugins.providers}
        raise ConfigError(f"there is no plugin '{name}'", did_you_mean(name, known))
    entries = [e for e in plugins.entries if e.provider in providers and e.kind != "command"]
    names = [entry.name for entry in entries]
    for component in components:
        if component not in names:
            raise ConfigError(f"plugin '{name}' has no component '{component}'", did_you_mean(component, names))
    return [entry for entry in entries if not components or entry.name in components]


def check_entry(entry: Entry, registry: Registry, device: str, verbose: bool) -> int:
    """Print the results of the checks of one component; returns how many failed."""
    from backdoor_bench_none.testing import run_contract

    title = f"{entry.kind} {entry.name}"
    if (component := _create(entry, registry, title)) is None:
        return 1
    if isinstance(component, str):
        say(f"skipped {title}: {component}")
        return 0
    failed = passed = skipped = 0
    for verdict in run_contract(component, device):
        if verdict.reason:
            failed += 1
            say(f"FAILED  {title}: {verdict.check}: {verdict.reason}")
        elif verdict.skipped:
            skipped += 1
            say(f"skipped {title}: {verdict.check}: {verdict.skipped}")
        else:
            passed += 1
            if verbose:
                say(f"passed  {title}: {verdict.check}")
    result = "FAILED" if failed else "passed"
    say(f"{result}  {title}: {passed} of {plural('check', passed + failed + skipped)}")
    return failed


def _create(entry: Entry, registry: Registry, title: str) -> Component | str | None:
    """An instance with default parameters, or the reason why there can be none.

    None if the component is broken; the fault is printed.
    """
    try:
        loaded = registry.load(entry.kind, entry.name)
        if needed := list(_required(loaded)):
            return f"it needs {', '.join(needed)}; check it in your own test, with backdoor_bench_none.testing"
        return registry.create(entry.kind, entry.name)
    except BenchError as error:
        say(f"FAILED  {title}: {error.message}")
    return None


def _required(component: type[Component]) -> Iterator[str]:
    return (name for name, field in component.model_fields.items() if field.is_required())
