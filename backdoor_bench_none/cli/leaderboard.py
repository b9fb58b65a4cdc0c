"""bbn leaderboard pack, verify, build, tracks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from backdoor_bench_none.cli.options import open_registry, results_option
from backdoor_bench_none.errors import BenchError, ConfigError, ExitCode
from backdoor_bench_none.planning.reading import parse_params

verifications_option = click.option(
    "--verifications", type=click.Path(path_type=Path), default=Path("verifications"), show_default=True,
    help="Folder of what `verify` found, a file for each submission.",
)  # fmt: skip


@click.group("leaderboard")
def leaderboard_command() -> None:
    """Submit a defense to a track, verify submissions, and build the site."""


@leaderboard_command.command("tracks")
def tracks_command() -> int:
    """Show the tracks and their rules; `bbn init FILE --from TRACK` writes a track's benchmark file."""
    from backdoor_bench_none.leaderboard.track import read_track, track_names

    for name in track_names():
        track = read_track(name)
        click.echo(f"{name}: {track.title}\n" + "".join(f"  {line}\n" for line in track.rules.splitlines()))
    return ExitCode.OK


@leaderboard_command.command("pack")
@click.option("-d", "--defense", required=True, metavar="NAME", help="The defense, by its registered name.")
@click.option("-p", "--param", multiple=True, metavar="NAME=VALUE", help="A parameter of it; may be repeated.")
@click.option("--track", default="digits-v1", show_default=True, help="See `bbn leaderboard tracks`.")
@results_option
@click.option("--claim", multiple=True, metavar="METRIC=SHARE", help="What you claim, as asr=0.02; may be repeated.")
@click.option("--authors", default="", help="Who submits it.")
@click.option("--paper", default="", help="Where it is described.")
@click.option("--code", default="", help="Where its code is.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder, or a file that ends in .zip.")
def pack_command(
    defense: str, param: tuple[str, ...], track: str, results: Path | None, claim: tuple[str, ...], output: Path | None,
    **about: str,
) -> int:  # fmt: skip
    """Make a submission of the records and the defended weights of all cells of a track."""
    import tempfile

    from backdoor_bench_none.leaderboard.pack import pack
    from backdoor_bench_none.leaderboard.submission import write_archive
    from backdoor_bench_none.leaderboard.track import read_track

    registry, found = open_registry(None), read_track(track)
    target = output or Path("submissions") / track / defense / registry.entry("defense", defense).provider.version
    given: dict[str, Any] = {"defense": defense, "params": parse_params(param), "claims": _claims(claim), **about}
    if target.suffix == ".zip":
        if target.exists():
            raise BenchError(f"'{target}' is there already", "choose another file with --output")
        with tempfile.TemporaryDirectory(prefix="bbn-submission-") as folder:
            submission = pack(found, registry, results or Path("results"), Path(folder) / "submission", **given)
            write_archive(Path(folder) / "submission", target)
    else:
        submission = pack(found, registry, results or Path("results"), target, **given)
    click.echo(f"wrote {target}: {submission.title}, {len(submission.files) // 2} cells of {track}")
    return ExitCode.OK


def _claims(pairs: tuple[str, ...]) -> dict[str, Any]:
    claims = parse_params(pairs)
    known = ("ba", "asr", "ra", "der")
    for name, value in claims.items():
        if name not in known or type(value) not in (int, float) or not 0 <= value <= 1:
            raise ConfigError(f"--claim {name}={value}", f"one of {', '.join(known)}, as a fraction of 1")
    return claims


@leaderboard_command.command("verify")
@click.argument("submission", type=click.Path(path_type=Path))
@click.option("--cells", "sample", type=click.IntRange(min=0), default=3, show_default=True, help="Cells to run again.")
@click.option("--seed", type=int, help="Which cells are drawn; default: nobody can know beforehand.")
@click.option("--run-code", is_flag=True, help="Import and run the installed package of a stranger's defense.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--results", type=click.Path(path_type=Path), help="Where to keep work; default: a temporary folder.")
@verifications_option
def verify_command(
    submission: Path, sample: int, seed: int | None, run_code: bool, device: str, results: Path | None,
    verifications: Path,
) -> int:  # fmt: skip
    """Check form and hashes of SUBMISSION, evaluate every model again from its weights, run a sample of cells again.

    Nothing is unpickled, and no code of the submission's authors is imported without --run-code. Exit code 1 if it is
    refused.
    """
    import secrets
    import tempfile

    from backdoor_bench_none.contracts.context import Context, choose_device
    from backdoor_bench_none.leaderboard.submission import as_plain, open_submission
    from backdoor_bench_none.leaderboard.verification import verification_path, write_verification
    from backdoor_bench_none.leaderboard.verify import Verifier
    from backdoor_bench_none.report.tables import open_console
    from backdoor_bench_none.run.progress import Lines

    chosen, drawn = choose_device(device), secrets.randbelow(2**32) if seed is None else seed
    with open_submission(submission) as folder, tempfile.TemporaryDirectory(prefix="bbn-verify-") as work:
        verifier = Verifier(
            folder, results or Path(work), Context(chosen, 0), run_code, sample, drawn, Lines(open_console())
        )
        found = verifier.verify()
    path = verification_path(verifications, found.submission_sha256)
    write_verification(path, found)
    for finding in found.findings:
        if not finding.ok:
            place = f" of {as_plain(finding.cell)}" if finding.cell else ""
            click.echo(f"FAILED  {finding.check}{place}: {finding.message}")
    repeated = f"{len(found.repeated)} cells run again (--seed {drawn})"
    click.echo(f"{len(found.reevaluated)} models evaluated again, {repeated}")
    click.echo(f"{found.verdict}; wrote {path}")
    return ExitCode.CELLS_FAILED if found.verdict == "refused" else ExitCode.OK


@leaderboard_command.command("build")
@click.argument("submissions", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), default=Path("site"), show_default=True, help="Folder.")
@verifications_option
def build_command(submissions: tuple[Path, ...], output: Path, verifications: Path) -> int:
    """Build the site of all SUBMISSIONS: folders, archives, or folders of them.

    Only what `verify` wrote into your own folder of verifications counts as verified.
    """
    from backdoor_bench_none.leaderboard.build import build_site
    from backdoor_bench_none.leaderboard.submission import as_plain

    for path in submissions:
        if not path.exists():
            raise BenchError(f"there is no '{path}'")
    entries, refused = build_site(submissions, output, verifications)
    for each in refused:
        click.echo(f"refused {as_plain(each.name)}: {as_plain(each.reason)}", err=True)
    click.echo(f"wrote {output}/index.html: {len(entries)} submissions, {len(refused)} refused")
    return ExitCode.OK
