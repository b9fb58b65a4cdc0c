"""benchmark.yaml: what may stand in it, read with line numbers, all faults at once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from backdoor_bench_none.errors import ConfigError, did_you_mean

Location = tuple[str | int, ...]
Fault = tuple[Location, str]

UNION_PART = re.compile(r"(str|int|float|bool|dict)$|.*\[")
DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd])")
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGTkmgt])(?:i?B)?")
BYTES = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


def _seconds(value: object) -> object:
    if isinstance(value, str):
        match = DURATION.fullmatch(value.strip())
        if match is None:
            raise ValueError(f"'{value}' is not a duration such as 90s, 30m or 2h")
        return float(match[1]) * SECONDS[match[2]]
    return value


def _bytes(value: object) -> object:
    if isinstance(value, str):
        match = SIZE.fullmatch(value.strip())
        if match is None:
            raise ValueError(f"'{value}' is not a size such as 500M, 4G or 4GiB")
        return int(float(match[1]) * BYTES[match[2].upper()])
    return value


def _named(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


def _listed(value: object) -> object:
    return value if isinstance(value, list) else [value]


def _name_or_mapping(value: object) -> object:
    if value is None or isinstance(value, str | dict):
        return value
    raise ValueError("a recipe is a name or a mapping")


def _flatten(value: object) -> object:
    """`{name: local, slots: 2}` -> name and params, as executors are written without a `params` level."""
    if isinstance(value, dict) and "name" in value and "params" not in value:
        return {"name": value["name"], "params": {k: v for k, v in value.items() if k != "name"}}
    return _named(value)


class Entry(_Strict):
    """One value of an axis: a name, or a mapping with parameters;
    `sweep` makes one entry per combination of its values.
    """

    name: str
    params: dict[str, Any] = {}
    sweep: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    label: str | None = Field(None, alias="as")
    recipe: Annotated[str | dict[str, Any] | None, BeforeValidator(_name_or_mapping)] = None


AnEntry = Annotated[Entry, BeforeValidator(_named)]
Entries = Annotated[list[AnEntry], BeforeValidator(_listed), Field(min_length=1)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Names = Annotated[list[str], BeforeValidator(_listed)]


class Matrix(_Strict):
    """The axes that are crossed."""

    dataset: Entries = [Entry(name="digits")]
    attack: Entries
    defense: Entries
    architecture: Entries
    activation: Entries = [Entry(name="relu")]
    trainer: Entries = [Entry(name="centralized")]


class Exclude(_Strict):
    """Cells to leave out: those that match every axis named here, by label or name."""

    dataset: Names | None = None
    attack: Names | None = None
    defense: Names | None = None
    architecture: Names | None = None
    activation: Names | None = None
    trainer: Names | None = None
    seed: Annotated[list[int], BeforeValidator(_listed)] | None = None
    because: str | None = None


class Budget(_Strict):
    """Limits for each stage of a cell: seconds, and bytes that its process may allocate (Linux, not with CUDA)."""

    cell_timeout: Annotated[float, BeforeValidator(_seconds), Field(gt=0)] | None = None
    memory: Annotated[int, BeforeValidator(_bytes), Field(gt=0)] | None = None


class Config(_Strict):
    """A whole benchmark file."""

    version: Literal[1]
    name: str = Field(min_length=1)
    seeds: Annotated[list[Seed], BeforeValidator(_listed), Field(min_length=1)] = [0]
    results: Path = Path("results")
    matrix: Matrix
    include: list[Matrix] = []
    exclude: list[Exclude] = []
    defaults: dict[str, dict[str, dict[str, Any]]] = {}
    metrics: list[AnEntry] = []
    budget: Budget = Budget()
    executor: Annotated[Entry, BeforeValidator(_flatten)] = Entry(name="local")


class Source:
    """The text of a benchmark file, which knows where each of its values stands."""

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        self.repeated: list[Fault] = []
        self._root: yaml.Node | None = None
        try:
            loader = yaml.SafeLoader(text)
            self._root = loader.get_single_node()
            self.repeated = list(_repeated(self._root, ()))  # before constructing, which rewrites merged mappings
            self.value = None if self._root is None else loader.construct_document(self._root)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else f"{name}:1:1"
            raise ConfigError(f"{place}: {error.problem or error.context}", "it is not YAML") from error
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"{name}:1:1: {' '.join(str(error).split())}", "it is not YAML") from error

    def place(self, location: Sequence[str | int]) -> str:
        """file:line:column of the value at `location`, or of the deepest part of the path that is there."""
        node = self._root
        for part in location:
            child = _child(node, part)
            if child is None:
                break
            node = child
        line, column = (node.start_mark.line + 1, node.start_mark.column + 1) if node is not None else (1, 1)
        return f"{self.name}:{line}:{column}"

    def fail(self, faults: Sequence[Fault]) -> ConfigError:
        """One error that lists all faults, each at its place."""
        lines = [f"{self.place(location)}: {_path(location)}: {message}" for location, message in faults]
        return ConfigError("\n".join(dict.fromkeys(lines)))


def _child(node: yaml.Node | None, part: str | int) -> yaml.Node | None:
    if isinstance(node, yaml.MappingNode):
        found = [value for key, value in node.value if key.value == str(part)]
        return found[-1] if found else node if part == 0 else None  # a single entry may stand without its list
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
                yield (*location, name), "the key stands twice"
            seen.add(name)
            yield from _repeated(value, (*location, name))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _repeated(value, (*location, index))


def _path(location: Location) -> str:
    return ".".join(str(part) for part in location) or "the file"


def read_config(path: Path) -> tuple[Config, Source]:
    """The validated content of a benchmark file; a `ConfigError` lists every fault with its line and column."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"there is no file '{path}'", "`bbn init` writes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}' cannot be read: {error}") from error
    return parse_config(text, str(path))


def parse_config(text: str, name: str = "benchmark.yaml") -> tuple[Config, Source]:
    """As `read_config`, from a text."""
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
    # a part in brackets or a type's name tells which member of a union was tried
    location: Location = tuple(part for part in fault["loc"] if not (isinstance(part, str) and UNION_PART.match(part)))
    if fault["type"] == "extra_forbidden":
        return location, f"unknown key, {did_you_mean(str(location[-1]), _known_keys(location))}"
    if fault["type"] == "missing":
        return location, "it is missing"
    return location, str(fault["msg"]).removeprefix("Value error, ")


def _known_keys(location: Location) -> list[str]:
    """The keys allowed beside an unknown one."""
    sections: dict[str, type[BaseModel]]
    sections = {"matrix": Matrix, "include": Matrix, "exclude": Exclude, "budget": Budget, "metrics": Entry}
    model = sections.get(str(location[0]), Config)
    if len(location) == 1:
        model = Config
    elif model is Matrix and len(location) > 2 + (location[0] == "include"):
        model = Entry
    return [field.alias or name for name, field in model.model_fields.items()]
