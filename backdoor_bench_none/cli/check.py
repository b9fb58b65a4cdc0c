"""bbn check."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from backdoor_bench_none.cli.options import open_registry
from backdoor_bench_none.errors import BenchError, ConfigError, ExitCode, PluginError, did_you_mean

if TYPE_CHECKING:
    from backdoor_bench_none.contracts.component import Component
    from backdoor_bench_none.registry.components import Registry
    from backdoor_bench_none.registry.plugins import Entry, Plugins


@click.command("check")
@click.argument("plugin")
@click.argument("components", nargs=-1, metavar="[COMPONENT]...")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("-v", "--verbose", is_flag=True, help="Name every check.")
def check_command(plugin: str, components: tuple[str, ...], device: str, verbose: bool) -> int:
    """Check that the components of PLUGIN keep their part, with their default parameters on tiny data.

    PLUGIN is a distribution or a plugin's name (`bbn list plugins`), or bbnfile. Exit code 1 if a check fails.
    """
    from backdoor_bench_none.contracts.context import choose_device

    choose_device(device)
    registry = open_registry(None)
    failed = 0
    entries = find_entries(registry.plugins, plugin, components)
    for entry in entries:
        failed += check_entry(entry, registry, device, verbose)
    click.echo(f"{len(entries)} components of {plugin}, {failed} checks failed" if failed else "all checks passed")
    return ExitCode.CELLS_FAILED if failed else ExitCode.OK


def find_entries(plugins: Plugins, name: str, components: tuple[str, ...]) -> list[Entry]:
    """The components of a plugin or distribution; `PluginError` if it is broken, `ConfigError` if it is none."""
    for broken in plugins.broken:
        if name in (broken.provider.plugin, broken.provider.distribution):
            raise PluginError(f"plugin {broken.provider} is not in use: {broken.reason}")
    providers = [p for p in plugins.providers if name in (p.plugin, p.distribution)]
    if not providers:
        known = {known for p in plugins.providers for known in (p.plugin, p.distribution)}
        raise ConfigError(f"there is no plugin '{name}'", did_you_mean(name, known))
    entries = [e for e in plugins.entries if e.provider in providers and e.kind != "command"]
    for component in components:
        if component not in (names := [entry.name for entry in entries]):
            raise ConfigError(f"plugin '{name}' has no component '{component}'", did_you_mean(component, names))
    return [entry for entry in entries if not components or entry.name in components]


def check_entry(entry: Entry, registry: Registry, device: str, verbose: bool) -> int:
    """Print the verdicts on one component, and return how many checks failed."""
    from backdoor_bench_none.testing import run_contract

    title = f"{entry.kind} {entry.name}"
    if (component := _create(entry, registry, title)) is None:
        return 1
    if isinstance(component, str):
        click.echo(f"skipped {title}: {component}")
        return 0
    failed = passed = 0
    for verdict in run_contract(component, device):
        if verdict.reason:
            failed += 1
            click.echo(f"FAILED  {title}: {verdict.check}: {verdict.reason}")
        else:
            passed += 1
            if verbose:
                click.echo(f"passed  {title}: {verdict.check}")
    click.echo(f"{'passed ' if not failed else 'FAILED '} {title}: {passed} of {passed + failed} checks")
    return failed


def _create(entry: Entry, registry: Registry, title: str) -> Component | str | None:
    """An instance with default parameters, or why there can be none; None, with the fault printed, if it is broken."""
    try:
        loaded = registry.load(entry.kind, entry.name)
        if needed := list(_required(loaded)):
            return f"it needs {', '.join(needed)}; check it in a test of your own, with backdoor_bench_none.testing"
        return registry.create(entry.kind, entry.name)
    except BenchError as error:
        click.echo(f"FAILED  {title}: {error.message}")
    return None


def _required(component: type[Component]) -> Iterator[str]:
    return (name for name, field in component.model_fields.items() if field.is_required())
