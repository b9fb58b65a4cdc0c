"""bbn doctor."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import click

from backdoor_bench_none.cli.options import open_registry
from backdoor_bench_none.errors import ExitCode
from backdoor_bench_none.registry.plugins import own_version


@click.command("doctor")
def doctor_command() -> int:
    """Show versions, devices, precision, disk space and plugins; exit 2 if something does not work."""
    faults = []
    for name, value, fault in examine():
        click.echo(f"{'!' if fault else ' '} {name:14} {value}")
        faults += [name] if fault else []
    if faults:
        click.echo(f"something is wrong with: {', '.join(faults)}")
    return ExitCode.USAGE_ERROR if faults else ExitCode.OK


def examine() -> Iterator[tuple[str, str, bool]]:
    """What was looked at, what was found, and whether that is a fault."""
    import platform

    from backdoor_bench_none.run.provenance import LIBRARIES, installed_version
    from backdoor_bench_none.system import count_cores

    yield "version", f"backdoor-bench-none {own_version()}, Python {platform.python_version()}", False
    for library in LIBRARIES:
        found = installed_version(library)
        yield library, found or "not installed", found is None
    yield from _imports()
    yield from _devices()
    yield "cores", str(count_cores()), False
    yield "disk", f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB free here", False
    plugins = open_registry(None).plugins
    for provider in plugins.providers:
        yield "plugin", str(provider), False
    for broken in plugins.broken:
        yield "plugin", f"{broken.provider}: {broken.reason}", True


def _imports() -> Iterator[tuple[str, str, bool]]:
    """torch and torchvision of different builds fail at import, not at installation."""
    try:
        import torchvision  # noqa: F401
    except Exception as error:
        yield "torchvision", f"does not fit this torch: {error}; reinstall both together", True


def _devices() -> Iterator[tuple[str, str, bool]]:
    import torch

    from backdoor_bench_none.contracts.context import choose_amp
    from backdoor_bench_none.run.provenance import device_name

    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in devices:
        amp = choose_amp(device)
        yield str(device), f"{device_name(device)}, {'float32' if amp is None else 'bfloat16 autocast'}", False
