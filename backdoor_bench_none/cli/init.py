"""The verb `bbn init`."""

from __future__ import annotations

from pathlib import Path

import click

from backdoor_bench_none.cli.options import scale_option
from backdoor_bench_none.cli.output import say
from backdoor_bench_none.errors import ConfigError, ExitCode, did_you_mean
from backdoor_bench_none.paper.presets import Scale, benchmark_names, benchmark_text


@click.command("init")
@click.argument("file", default="benchmark.yaml", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--from",
    "origin",
    metavar="NAME",
    help="Write the file of a table or figure of the paper (table4, fig6) or of a track (digits-v1).",
)
@scale_option("With --from: as in the paper, or on 10,000 images with narrow networks, for two CPU cores.")
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
def init_command(file: Path, origin: str | None, scale: Scale, force: bool) -> int:
    """Write a commented benchmark file that runs in minutes on a CPU, or one of the paper or of a track."""
    if origin is not None:
        text = text_from(origin, scale)
    elif scale == "full":
        text = default_benchmark()
    else:
        raise ConfigError("--scale goes with --from and a table of the paper, as table1")
    if file.exists() and not force:
        raise ConfigError(f"'{file}' exists already", "--force overwrites it")
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"'{file}' cannot be written: {error.strerror}") from error
    say(f"wrote {file}; run it: bbn run {file}")
    return ExitCode.OK


def text_from(name: str, scale: Scale = "full") -> str:
    """The benchmark file of a track of the leaderboard, or of a table or figure of the paper."""
    from backdoor_bench_none.leaderboard.track import read_track, track_names

    if name in track_names() and scale == "full":
        return read_track(name).commented_text()
    known = [*benchmark_names(), *track_names()]
    if name not in known:
        raise ConfigError(f"there is no benchmark file '{name}'", did_you_mean(name, known))
    return benchmark_text(name, scale)


def default_benchmark() -> str:
    """The text of the embedded benchmark file, which is in the package in a wheel and one folder up in a checkout."""
    package = Path(__file__).parents[1]
    packed = package / "benchmark.yaml"
    path = packed if packed.is_file() else package.parent / "benchmark.yaml"
    return path.read_text(encoding="utf-8")
