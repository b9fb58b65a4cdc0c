"""The verbs `bbn list` and `bbn show`."""

from __future__ import annotations

import inspect
import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from backdoor_bench_none.cli.options import open_registry
from backdoor_bench_none.cli.output import say
from backdoor_bench_none.errors import ConfigError, ExitCode, did_you_mean
from backdoor_bench_none.planning.reading import parse_params
from backdoor_bench_none.words import terminal_width

if TYPE_CHECKING:
    from backdoor_bench_none.contracts.component import Component
    from backdoor_bench_none.registry.plugins import Entry, Plugins, Provider

#: the KIND of `bbn list` -> the kind of component
KINDS = {
    "attacks": "attack",
    "defenses": "defense",
    "architectures": "architecture",
    "activations": "activation",
    "datasets": "dataset",
    "trainers": "trainer",
    "metrics": "metric",
    "executors": "executor",
}


LOWER = {"minimum": "≤", "exclusiveMinimum": "<"}
UPPER = {"maximum": "≤", "exclusiveMaximum": "<"}


@click.command("list")
@click.argument("kind", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print a list of JSON objects.")
def list_command(kind: str | None, as_json: bool) -> int:
    """List the components of KIND (attacks, defenses, ...) and their providers; `plugins` lists the plugins."""
    if kind is not None and kind not in (*KINDS, "plugins"):
        raise ConfigError(f"unknown kind '{kind}'", did_you_mean(kind, (*KINDS, "plugins")))
    plugins = open_registry(None).plugins
    rows = _rows(plugins, kind)
    if as_json:
        click.echo(json.dumps(rows, indent=1))
    else:
        say(_columns(rows))
    return ExitCode.OK


def _rows(plugins: Plugins, kind: str | None) -> list[dict[str, str]]:
    if kind == "plugins":
        return _plugin_rows(plugins)
    if kind is not None:
        return _component_rows(plugins, KINDS[kind])
    rows = []
    for each in KINDS.values():
        rows += _component_rows(plugins, each)
    return rows


def _plugin_rows(plugins: Plugins) -> list[dict[str, str]]:
    loaded = [_plugin_row(provider, "loaded") for provider in plugins.providers]
    return loaded + [_plugin_row(broken.provider, broken.reason) for broken in plugins.broken]


def _plugin_row(provider: Provider, status: str) -> dict[str, str]:
    return {
        "plugin": provider.plugin,
        "distribution": provider.distribution,
        "version": provider.version,
        "status": status,
    }


def _component_rows(plugins: Plugins, kind: str) -> list[dict[str, str]]:
    return [_component_row(entry) for entry in plugins.entries if entry.kind == kind]


def _component_row(entry: Entry) -> dict[str, str]:
    provider = entry.provider
    return {"kind": entry.kind, "name": entry.name, "distribution": provider.distribution, "version": provider.version}


def _columns(rows: list[dict[str, str]]) -> str:
    if not rows:
        return ""
    widths = {key: max(len(row[key]) for row in rows) for key in rows[0]}
    return "\n".join("  ".join(value.ljust(widths[key]) for key, value in row.items()).rstrip() for row in rows)


@click.command("show")
@click.argument("name")
@click.option(
    "--preview",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a sheet of an attack's images to this PNG.",
)
@click.option("--dataset", default="digits", show_default=True, help="The data set whose images the preview shows.")
@click.option("--root", type=click.Path(path_type=Path), help="The folder of that data set.")
@click.option(
    "-p",
    "--param",
    multiple=True,
    metavar="NAME=VALUE",
    help="A parameter of the attack in the preview; may be repeated.",
)
def show_command(name: str, preview: Path | None, dataset: str, root: Path | None, param: tuple[str, ...]) -> int:
    """Show a component: what it does, its parameters with types, bounds and defaults, its paper and provider."""
    registry = open_registry(None)
    if preview is not None:
        registry.entry("attack", name)
    for index, entry in enumerate(registry.find(name)):
        if index > 0:
            say("")
        say("\n".join(describe_component(entry, registry.load(entry.kind, entry.name))))
    if preview is not None:
        from backdoor_bench_none.report.preview import write_preview

        attack = registry.create("attack", name, parse_params(param))
        data = registry.create("dataset", dataset, {} if root is None else {"root": root})
        write_preview(attack, data, preview)  # type: ignore[arg-type]
        say(f"\nwrote {preview}")
    return ExitCode.OK


def describe_component(entry: Entry, component: type[Component]) -> list[str]:
    """The lines that `bbn show` prints for a component."""
    lines = [f"{entry.kind} {entry.name}", "", *_description(component), ""]
    lines += [f"{name:11} {text}" for name, text in component.facts().items()]
    if component.paper:
        lines.append(f"paper       {component.paper}")
    module = inspect.getsourcefile(component) or "?"
    provider = f"{entry.provider.distribution} {entry.provider.version}"
    lines.append(f"provider    {provider}, {component.__module__}:{component.__qualname__}")
    lines.append(f"source      {module}:{inspect.getsourcelines(component)[1]}")
    lines.append(f"revision    {component.revision}")
    properties = _properties(component.model_json_schema())
    if not properties:
        return [*lines, "", "no parameters"]
    lines += ["", "parameters:"]
    width = max(len(name) for name in properties)
    for name, schema in properties.items():
        default = "required"
        if "default" in schema:
            default = f"default {json.dumps(schema['default'])}"
        lines.append(f"  {name:{width}}  {_type_of(schema)}, {default}: {schema.get('description', '')}")
    return lines


def _description(component: type[Component]) -> list[str]:
    """The lines of a component's docstring; where one is wider than the terminal, paragraphs are filled anew.

    Paragraphs with indented lines are left as they are.
    """
    text = inspect.getdoc(component) or ""
    width = terminal_width()
    lines = text.splitlines()
    if width is None or all(len(line) <= width for line in lines):
        return lines
    filled: list[str] = []
    for paragraph in text.split("\n\n"):
        if "\n " not in paragraph:
            filled += textwrap.wrap(paragraph, width, break_long_words=False, break_on_hyphens=False)
        else:
            filled += paragraph.splitlines()
        filled.append("")
    return filled[:-1]


def _properties(schema: dict[str, Any]) -> dict[str, Any]:
    """The parameters that can be chosen, by name; those of a nested mapping as `outer.inner`."""
    properties: dict[str, Any] = {}
    for name, part in schema.get("properties", {}).items():
        if "$ref" in part:
            nested = schema["$defs"][part["$ref"].rpartition("/")[2]]
            properties[name] = {**part, "type": "mapping"}
            properties |= {f"{name}.{inner}": value for inner, value in nested["properties"].items()}
        elif not _is_fixed(part):
            properties[name] = part
    return properties


def _is_fixed(schema: dict[str, Any]) -> bool:
    """Whether the bounds leave a single value, as for `clean_fraction` of a defense that takes no clean data."""
    return "minimum" in schema and schema["minimum"] == schema.get("maximum")


def _type_of(schema: dict[str, Any]) -> str:
    """The type or the choices of a JSON schema, and its bounds."""
    if "anyOf" in schema:
        return " or ".join(_type_of(option) for option in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    if "prefixItems" in schema:
        return f"({', '.join(_type_of(item) for item in schema['prefixItems'])})"
    if schema.get("type") == "array" and "items" in schema:
        return f"list of {_type_of(schema['items'])}"
    name = schema.get("format") or schema.get("type", "value")
    low = next((f"{schema[key]:.4g} {sign} " for key, sign in LOWER.items() if key in schema), "")
    high = next((f" {sign} {schema[key]:.4g}" for key, sign in UPPER.items() if key in schema), "")
    return f"{low}{name}{high}"
