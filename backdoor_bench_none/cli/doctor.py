"""The verb `bbn doctor`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import click

from backdoor_bench_none.cli.options import open_registry
from backdoor_bench_none.cli.output import say
from backdoor_bench_none.errors import ExitCode
from backdoor_bench_none.registry.plugins import own_version


@click.command("doctor")
def doctor_command() -> int:
    """Show versions, devices, precision, disk space and plugins; exit with 2 if something does not work."""
    faults = []
    for name, value, is_fault in examine():
        mark = " "
        if is_fault:
            mark = "!"
            faults.append(name)
        say(f"{mark} {name:14} {value}")
    if faults:
        say(f"something is wrong with: {', '.join(faults)}")
    return ExitCode.USAGE_ERROR if faults else ExitCode.OK


def examine() -> Iterator[tuple[str, str, bool]]:
    """The name of each thing examined, its state, and whether that is a fault."""
    import platform

    from backdoor_bench_none.run.provenance import LIBRARIES, installed_version
    from backdoor_bench_none.system import count_cores

    yield "version", f"backdoor-bench-none {own_version()}, Python {platform.python_version()}", False
    for library in LIBRARIES:
        version = installed_version(library)
        yield library, version or "not installed", version is None
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
    """A fault if torch and torchvision are of different builds, which fails at import, not at installation."""
    try:
        import torchvision  # noqa: F401
    except Exception as error:
        yield "torchvision", f"does not fit this torch: {error}; reinstall both together", True


def _devices() -> Iterator[tuple[str, str, bool]]:
    import torch

    from backdoor_bench_none.contracts.context import choose_amp
    from backdoor_bench_none.run.provenance import device_name
    from backdoor_bench_none.system import describe_mps

    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in devices:
        precision = "float32" if choose_amp(device) is None else "bfloat16 autocast"
        yield str(device), f"{device_name(device)}, {precision}", False
    if torch.cuda.is_available():
        yield "MPS", describe_mps(), False
