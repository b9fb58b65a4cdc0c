"""Reads a benchmark file, and reports all its faults at once, with line numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from backdoor_bench_none.contracts.config import Budget, Config, Entry, Exclude, Fault, Location, Matrix
from backdoor_bench_none.errors import ConfigError, did_you_mean
from backdoor_bench_none.planning.source import Source, read_value
from backdoor_bench_none.registry.components import without_union_parts


def find_file(file: Path | None) -> Path:
    """The benchmark file: `file`, else ./benchmark.yaml; `ConfigError` if it does not exist."""
    path = file or Path("benchmark.yaml")
    if not path.is_file():
        hint = "`bbn init` writes one" if file is None else None
        raise ConfigError(f"there is no file '{path}'", hint)
    return path


def read_config(path: Path) -> tuple[Config, Source]:
    """The validated content of a benchmark file; `ConfigError` lists every fault with its line and column."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"there is no file '{path}'", "`bbn init` writes one") from None
    except OSError as error:
        raise ConfigError(f"'{path}' cannot be read: {error}") from error
    return parse_config(_decode(content, str(path)), str(path))


def _decode(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start].decode("utf-8-sig")
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        message = f"{name}:{line}:{column}: the byte 0x{content[error.start]:02x} is not UTF-8"
        raise ConfigError(message, "save the file as UTF-8") from error


def parse_config(text: str, name: str = "benchmark.yaml") -> tuple[Config, Source]:
    """The validated content of the text of a benchmark file; see `read_config`."""
    source = Source(text, name)
    if not isinstance(source.value, dict):
        raise ConfigError(f"{name}:1:1: the file holds no mapping", "`bbn init` writes an example")
    faults: list[Fault] = []
    try:
        config = Config.model_validate(source.value)
    except ValidationError as error:
        faults += [_explain(fault) for fault in error.errors()]
    if faults or source.faults:
        raise source.fail(faults)
    return config, source


def _explain(fault: Any) -> Fault:  # noqa: ANN401
    location: Location = without_union_parts(fault["loc"])
    if fault["type"] == "extra_forbidden":
        return location, f"unknown key, {did_you_mean(str(location[-1]), _known_keys(location))}"
    if fault["type"] == "missing":
        return location, "it is missing"
    return location, str(fault["msg"]).removeprefix("Value error, ")


def _known_keys(location: Location) -> list[str]:
    """The keys that are allowed where there is an unknown one."""
    sections: dict[str, type[BaseModel]]
    sections = {"matrix": Matrix, "include": Matrix, "exclude": Exclude, "budget": Budget, "metrics": Entry}
    model = sections.get(str(location[0]), Config)
    depth = 3 if location[0] == "include" else 2  # of a key of a matrix: `include` is a list of them
    if len(location) == 1:
        model = Config
    elif model is Matrix and len(location) > depth:
        model = Entry
    return [field.alias or name for name, field in model.model_fields.items()]


def parse_params(pairs: Sequence[str]) -> dict[str, Any]:
    """The parameters given as `NAME=VALUE` on a command line, with values in YAML."""
    params: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"'{pair}' is not NAME=VALUE")
        try:
            params[name] = read_value(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"'{value}' of '{name}' is not YAML") from error
    return params
