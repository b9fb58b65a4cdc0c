"""Reads a benchmark file, and reports all its faults at once, with line numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from backdoor_bench_none.contracts.config import Budget, Config, Entry, Exclude, Fault, Location, Matrix
from backdoor_bench_none.errors import ConfigError, did_you_mean

#: a part of pydantic's location that names the member of a union it tried
UNION_PART = re.compile(r"(str|int|float|bool|dict)$|.*\[")


class Source:
    """The values of a benchmark file, with the line and column of each."""

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        self.repeated: list[Fault] = []
        self._root: yaml.Node | None = None
        try:
            loader = yaml.SafeLoader(text)
            self._root = loader.get_single_node()
            self.repeated = list(_repeated(self._root, ()))  # before constructing, which rewrites merged mappings
            self.value: Any = None
            if self._root is not None:
                self.value = loader.construct_document(self._root)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line, column = (mark.line, mark.column) if mark else (0, 0)
            message = f"{name}:{line + 1}:{column + 1}: {error.problem or error.context}"
            raise ConfigError(message, "it is not YAML") from error
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"{name}:1:1: {' '.join(str(error).split())}", "it is not YAML") from error

    def place(self, location: Sequence[str | int]) -> str:
        """file:line:column of the value at `location`, or of its deepest parent in the file."""
        node = self._root
        for part in location:
            child = _child(node, part)
            if child is None:
                break
            node = child
        if node is None:
            return f"{self.name}:1:1"
        return f"{self.name}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"

    def fail(self, faults: Sequence[Fault]) -> ConfigError:
        """One error that lists all faults with their places."""
        lines = [f"{self.place(location)}: {_path(location)}: {message}" for location, message in faults]
        return ConfigError("\n".join(dict.fromkeys(lines)))


def _child(node: yaml.Node | None, part: str | int) -> yaml.Node | None:
    if isinstance(node, yaml.MappingNode):
        values = [value for key, value in node.value if key.value == str(part)]
        if values:
            last: yaml.Node = values[-1]
            return last
        return node if part == 0 else None  # a single entry may stand without a list
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        child: yaml.Node = node.value[part]
        return child
    return None


def _repeated(node: yaml.Node | None, location: Location) -> Iterator[Fault]:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name = str(key.value)
            if name in seen:
                yield (*location, name), "the key is given twice"
            seen.add(name)
            yield from _repeated(value, (*location, name))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _repeated(value, (*location, index))


def _path(location: Location) -> str:
    return ".".join(str(part) for part in location) or "the file"


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
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"there is no file '{path}'", "`bbn init` writes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}' cannot be read: {error}") from error
    return parse_config(text, str(path))


def parse_config(text: str, name: str = "benchmark.yaml") -> tuple[Config, Source]:
    """The validated content of the text of a benchmark file; see `read_config`."""
    source = Source(text, name)
    if not isinstance(source.value, dict):
        raise ConfigError(f"{name}:1:1: the file holds no mapping", "`bbn init` writes an example")
    faults = list(source.repeated)
    try:
        config = Config.model_validate(source.value)
    except ValidationError as error:
        faults += [_explain(fault) for fault in error.errors()]
    if faults:
        raise source.fail(faults)
    return config, source


def _explain(fault: Any) -> Fault:  # noqa: ANN401
    # a part in brackets, or the name of a type, names the member of a union that pydantic tried
    location: Location = tuple(part for part in fault["loc"] if not (isinstance(part, str) and UNION_PART.match(part)))
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
            params[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"'{value}' of '{name}' is not YAML") from error
    return params
