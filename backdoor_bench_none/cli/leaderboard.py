"""The verbs `bbn leaderboard pack`, `verify`, `build` and `tracks`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from backdoor_bench_none.cli.options import open_registry, results_option
from backdoor_bench_none.cli.output import say
from backdoor_bench_none.errors import BenchError, ConfigError, ExitCode
from backdoor_bench_none.planning.reading import parse_params
from backdoor_bench_none.words import plural

verifications_option = click.option(
    "--verifications", type=click.Path(path_type=Path), default=Path("verifications"), show_default=True,
    help="Folder of the results of `verify`, one file per submission.",
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
        say(f"{name}: {track.title}")
        for line in track.rules.splitlines():
            say(f"  {line}")
        say("")
    return ExitCode.OK


@leaderboard_command.command("pack")
@click.option("-d", "--defense", required=True, metavar="NAME", help="The registered name of the defense.")
@click.option("-p", "--param", multiple=True, metavar="NAME=VALUE", help="A parameter of the defense; may be repeated.")
@click.option("--track", default="digits-v1", show_default=True, help="See `bbn leaderboard tracks`.")
@results_option
@click.option(
    "--claim", multiple=True, metavar="METRIC=SHARE", help="A result you claim, as asr=0.02; may be repeated."
)
@click.option("--authors", default="", help="The authors of the submission.")
@click.option("--paper", default="", help="Where it is described.")
@click.option("--code", default="", help="Where its code is.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder to write, or a file that ends in .zip.")
def pack_command(
    defense: str, param: tuple[str, ...], track: str, results: Path | None, claim: tuple[str, ...], authors: str,
    paper: str, code: str, output: Path | None,
) -> int:  # fmt: skip
    """Write a submission: the records and the defended weights of all cells of a track."""
    import tempfile

    from backdoor_bench_none.leaderboard.pack import pack
    from backdoor_bench_none.leaderboard.submission import write_archive
    from backdoor_bench_none.leaderboard.track import read_track

    registry = open_registry(None)
    write = partial(
        pack, read_track(track), registry, results or Path("results"), defense=defense, params=parse_params(param),
        claims=_claims(claim), authors=authors, paper=paper, code=code,
    )  # fmt: skip
    target = output or Path("submissions") / track / defense / registry.entry("defense", defense).provider.version
    if target.suffix == ".zip":
        if target.exists():
            raise BenchError(f"'{target}' exists already", "choose another file with --output")
        with tempfile.TemporaryDirectory(prefix="bbn-submission-") as folder:
            submission = write(Path(folder) / "submission")
            write_archive(Path(folder) / "submission", target)
    else:
        submission = write(target)
    say(f"wrote {target}: {submission.title}, {plural('cell', len(submission.files) // 2)} of {track}")
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
@click.option(
    "--cells", "sample", type=click.IntRange(min=0), default=3, show_default=True, help="Number of cells to run again."
)
@click.option("--seed", type=int, help="Seed of the sample; default: drawn at verification time.")
@click.option("--run-code", is_flag=True, help="Import and run the installed third-party package of the defense.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    help="Results folder of the cells run again; default: a temporary one.",
)
@verifications_option
def verify_command(
    submission: Path, sample: int, seed: int | None, run_code: bool, device: str, results: Path | None,
    verifications: Path,
) -> int:  # fmt: skip
    """Check format and hashes of SUBMISSION, evaluate every model again from its weights, run a sample of cells again.

    Nothing is unpickled, and the authors' code is imported only with --run-code. The exit code is 1 if the submission
    is refused.
    """
    import secrets
    import tempfile

    from backdoor_bench_none.contracts.context import Context, choose_device
    from backdoor_bench_none.leaderboard.submission import as_plain, open_submission
    from backdoor_bench_none.leaderboard.verification import verification_path, write_verification
    from backdoor_bench_none.leaderboard.verify import Verifier
    from backdoor_bench_none.report.tables import open_console
    from backdoor_bench_none.run.progress import Lines

    chosen = choose_device(device)
    if seed is None:
        seed = secrets.randbelow(2**32)
    with open_submission(submission) as folder, tempfile.TemporaryDirectory(prefix="bbn-verify-") as work:
        verifier = Verifier(
            folder, results or Path(work), Context(chosen, 0), run_code, sample, seed, Lines(open_console())
        )
        verification = verifier.verify()
    path = verification_path(verifications, verification.submission_sha256)
    write_verification(path, verification)
    for finding in verification.findings:
        if finding.ok:
            continue
        check = finding.check
        if finding.cell:
            check += f" of {as_plain(finding.cell)}"
        say(f"FAILED  {check}: {finding.message}")
    models = plural("model", len(verification.reevaluated))
    say(f"{models} evaluated again, {plural('cell', len(verification.repeated))} run again (--seed {seed})")
    say(f"{verification.verdict}; wrote {path}")
    return ExitCode.CELLS_FAILED if verification.verdict == "refused" else ExitCode.OK


@leaderboard_command.command("build")
@click.argument("submissions", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), default=Path("site"), show_default=True, help="Folder.")
@verifications_option
def build_command(submissions: tuple[Path, ...], output: Path, verifications: Path) -> int:
    """Build the site from SUBMISSIONS: folders, archives, or folders of them.

    A submission counts as verified only by a file that `verify` wrote into your folder of verifications.
    """
    from backdoor_bench_none.leaderboard.build import build_site
    from backdoor_bench_none.leaderboard.submission import as_plain

    for path in submissions:
        if not path.exists():
            raise BenchError(f"there is no '{path}'")
    entries, refused = build_site(submissions, output, verifications)
    for each in refused:
        say(f"refused {as_plain(each.name)}: {as_plain(each.reason)}", err=True)
    say(f"wrote {output}/index.html: {plural('submission', len(entries))}, {len(refused)} refused")
    return ExitCode.OK
