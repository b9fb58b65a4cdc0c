"""bbn list, bbn show."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from backdoor_bench_none.cli.options import open_registry
from backdoor_bench_none.errors import ConfigError, ExitCode, did_you_mean
from backdoor_bench_none.planning.reading import parse_params

if TYPE_CHECKING:
    from backdoor_bench_none.contracts.component import Component
    from backdoor_bench_none.registry.plugins import Entry

#: what `bbn list KIND` takes -> the kind of component
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
@click.option("--json", "as_json", is_flag=True, help="A list of objects.")
def list_command(kind: str | None, as_json: bool) -> int:
    """List components by KIND (attacks, defenses, ...) and who provides them; `plugins` lists the providers."""
    if kind is not None and kind not in (*KINDS, "plugins"):
        raise ConfigError(f"unknown kind '{kind}'", did_you_mean(kind, (*KINDS, "plugins")))
    plugins = open_registry(None).plugins
    if kind == "plugins":
        rows = [
            {"plugin": p.plugin, "distribution": p.distribution, "version": p.version, "status": "loaded"}
            for p in plugins.providers
        ]
        rows += [
            {
                "plugin": b.provider.plugin,
                "distribution": b.provider.distribution,
                "version": b.provider.version,
                "status": b.reason,
            }
            for b in plugins.broken
        ]
    else:
        wanted = [KINDS[kind]] if kind else list(KINDS.values())
        rows = [_listed(entry) for k in wanted for entry in plugins.entries if entry.kind == k]
    click.echo(json.dumps(rows, indent=1) if as_json else _columns(rows))
    return ExitCode.OK


def _listed(entry: Entry) -> dict[str, str]:
    provider = entry.provider
    return {"kind": entry.kind, "name": entry.name, "distribution": provider.distribution, "version": provider.version}


def _columns(rows: list[dict[str, str]]) -> str:
    widths = {key: max(len(row[key]) for row in rows) for key in rows[0]} if rows else {}
    return "\n".join("  ".join(value.ljust(widths[key]) for key, value in row.items()).rstrip() for row in rows)


@click.command("show")
@click.argument("name")
@click.option(
    "--preview",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a sheet of an attack's images to this PNG.",
)
@click.option("--dataset", default="digits", show_default=True, help="Whose images the preview shows.")
@click.option("--root", type=click.Path(path_type=Path), help="Where that data set lies.")
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
        component = registry.load(entry.kind, entry.name)
        click.echo(("\n" if index else "") + "\n".join(describe_component(entry, component)))
    if preview is not None:
        from backdoor_bench_none.report.preview import write_preview

        attack = registry.create("attack", name, parse_params(param))
        data = registry.create("dataset", dataset, {} if root is None else {"root": root})
        write_preview(attack, data, preview)  # type: ignore[arg-type]
        click.echo(f"\nwrote {preview}")
    return ExitCode.OK


def describe_component(entry: Entry, component: type[Component]) -> list[str]:
    """All `bbn show` says of a component."""
    lines = [f"{entry.kind} {entry.name}", "", *(inspect.getdoc(component) or "").splitlines(), ""]
    lines += [f"{name:11} {text}" for name, text in component.facts().items()]
    if component.paper:
        lines.append(f"paper       {component.paper}")
    module = inspect.getsourcefile(component) or "?"
    provider = f"{entry.provider.distribution} {entry.provider.version}"
    lines.append(f"provider    {provider}, {component.__module__}:{component.__qualname__}")
    lines.append(f"source      {module}:{inspect.getsourcelines(component)[1]}")
    lines.append(f"revision    {component.revision}")
    properties = _properties(component.model_json_schema()) if component.model_fields else {}
    lines += ["", "parameters:" if properties else "no parameters"]
    width = max((len(name) for name in properties), default=0)
    for name, schema in properties.items():
        default = "required" if "default" not in schema else f"default {json.dumps(schema['default'])}"
        lines.append(f"  {name:{width}}  {_type_of(schema)}, {default}: {schema.get('description', '')}")
    return lines


def _properties(schema: dict[str, Any]) -> dict[str, Any]:
    """The parameters that can be chosen; behind one with parameters of its own, these as `outer.inner`."""
    found: dict[str, Any] = {}
    for name, part in schema["properties"].items():
        if "$ref" in part:
            inner = schema["$defs"][part["$ref"].rpartition("/")[2]]
            found[name] = {**part, "type": "mapping"}
            found |= {f"{name}.{below}": value for below, value in inner["properties"].items()}
        elif not _is_fixed(part):
            found[name] = part
    return found


def _is_fixed(schema: dict[str, Any]) -> bool:
    """Whether bounds leave a single value, as `clean_fraction` of a defense that takes no clean data."""
    return "minimum" in schema and schema["minimum"] == schema.get("maximum")


def _type_of(schema: dict[str, Any]) -> str:
    """A JSON schema in a few words: the type or the choices, and the bounds."""
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
