"""The entry point of `bbn`: verbs by name, errors without tracebacks, warnings in one line, exit codes."""

from __future__ import annotations

import importlib
import io
import sys
import warnings
from typing import TYPE_CHECKING, Any

import click

from backdoor_bench_none.cli.output import say
from backdoor_bench_none.errors import BenchError, ExitCode
from backdoor_bench_none.lazy import import_when_used
from backdoor_bench_none.registry.plugins import own_version
from backdoor_bench_none.words import LONGEST_LINE, shorten, text_of

if TYPE_CHECKING:
    from backdoor_bench_none.registry.components import Registry
    from backdoor_bench_none.registry.plugins import Entry

#: verb -> module under backdoor_bench_none.cli, which has a command of that name
VERBS = {
    "init": "init",
    "list": "catalogue",
    "show": "catalogue",
    "plan": "run",
    "run": "run",
    "status": "status",
    "table": "table",
    "report": "report",
    "plot": "plot",
    "results": "results",
    "paper": "paper",
    "leaderboard": "leaderboard",
    "check": "check",
    "new": "new",
    "doctor": "doctor",
}

#: verbs that train and run networks in this process; the others use large libraries seldom
COMPUTING = ("plot", "leaderboard", "check", "doctor")
LARGE_LIBRARIES = ("numpy", "torch", "torch.fx", "torch.nn", "torch.nn.functional", "cv2")
#: characters of a verb's first sentence in the list of verbs, where click breaks it between words
LONGEST_HELP = 400


class LazyGroup(click.Group):
    """Imports the module of a verb when the verb is used.

    Plugins are loaded for the help and for verbs that are not built in; a built-in verb cannot be replaced.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The built-in verbs in the order in which they are used, then those of plugins."""
        return [*VERBS, *_added_verbs(ctx)]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The command of a verb; `BenchError` if a plugin's command cannot be imported."""
        if name in VERBS:
            module = importlib.import_module(f"backdoor_bench_none.cli.{VERBS[name]}")
            command: click.Command = getattr(module, f"{name}_command")
            return command
        if name in _added_verbs(ctx):
            return _import_command(_registry(ctx).entry("command", name))
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of verbs as click writes it; a verb that cannot be imported is shown with the reason."""
        rows = []
        for name in self.list_commands(ctx):
            try:
                command = self.get_command(ctx, name)
            except BenchError as error:
                rows.append((name, f"(broken) {error.message}"))
                continue
            if command is not None and not command.hidden:
                rows.append((name, command.get_short_help_str(LONGEST_HELP)))
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The verb as click resolves it, with a suggestion for an unknown one."""
        from backdoor_bench_none.errors import did_you_mean

        if args and args[0] not in VERBS and not args[0].startswith("-") and args[0] not in _added_verbs(ctx):
            raise BenchError(f"unknown command '{args[0]}'", did_you_mean(args[0], self.list_commands(ctx)))
        return super().resolve_command(ctx, args)


def _registry(ctx: click.Context) -> Registry:
    """The registry, opened once for each command line."""
    from backdoor_bench_none.cli.options import open_registry

    key = "backdoor_bench_none.registry.components"
    if key not in ctx.meta:
        ctx.meta[key] = open_registry(None)
    registry: Registry = ctx.meta[key]
    return registry


def _added_verbs(ctx: click.Context) -> list[str]:
    """The verbs that plugins add."""
    return [name for name in _registry(ctx).names("command") if name not in VERBS]


def _import_command(entry: Entry) -> click.Command:
    from backdoor_bench_none.errors import PluginError
    from backdoor_bench_none.registry.components import import_target

    command = import_target(entry)
    if not isinstance(command, click.Command):
        raise PluginError(f"command '{entry.name}' of plugin {entry.provider} is not a click command")
    return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(own_version(), prog_name="bbn")
def cli() -> None:
    """Benchmark backdoor defenses: cross attacks, defenses, architectures and activations into one matrix."""


def main() -> None:
    """Run `bbn` and exit."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal of another encoding shows ? for what it lacks
            stream.reconfigure(errors="replace")
    warnings.showwarning = _show_warning
    verb = next((word for word in sys.argv[1:] if not word.startswith("-")), None)
    if verb is None or (verb in VERBS and verb not in COMPUTING):
        import_when_used(*LARGE_LIBRARIES)
    sys.exit(run_cli(sys.argv[1:]))


def run_cli(arguments: list[str]) -> int:
    """Run `bbn` with `arguments` and return its exit code."""
    try:
        result: Any = cli.main(arguments, prog_name="bbn", standalone_mode=False)
        return int(result or ExitCode.OK)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        verb = context.command_path if context else "bbn"
        say(f"error: {error.format_message()}", err=True)
        say(f"hint: {verb} -h", err=True)
        return ExitCode.USAGE_ERROR
    except BenchError as error:
        for line in error.message.splitlines():
            say(f"error: {shorten(line, LONGEST_LINE)}", err=True)
        if error.hint is not None:
            say(f"hint: {error.hint}", err=True)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        say("interrupted", err=True)
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return ExitCode.OK
    except OSError as error:  # a path that cannot be, a disk that fails: nothing to report as a bug
        say(f"error: {error.filename or 'the system'}: {error.strerror or error}", err=True)
        return ExitCode.USAGE_ERROR
    except Exception:
        import traceback

        traceback.print_exc()
        say(
            "error: this is a bug in backdoor-bench-none; please report it with the text above and the output of "
            "`bbn doctor`",
            err=True,
        )
        return ExitCode.INTERNAL_ERROR


def _show_warning(message: Warning | str, *rest: object, **named: object) -> None:
    text = text_of(message) if isinstance(message, Warning) else message
    say(f"warning: {shorten(text, LONGEST_LINE)}", err=True)
