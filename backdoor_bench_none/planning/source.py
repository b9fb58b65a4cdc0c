"""The values of a benchmark file, which is YAML 1.2, with the line and column of each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import yaml
from yaml.constructor import ConstructorError, SafeConstructor
from yaml.resolver import BaseResolver

from backdoor_bench_none.contracts.config import Fault, Location
from backdoor_bench_none.errors import ConfigError
from backdoor_bench_none.words import has_control_characters, visible

#: values that a file may hold once its aliases are written out; a few lines can stand for billions
MOST_VALUES = 1_000_000
#: levels of lists and mappings in each other
DEEPEST = 100

_TAG = "tag:yaml.org,2002:"
#: tag -> the plain texts that have it and their first characters: YAML 1.2, where `no` and `on` are texts and `1e-3` is
#: a number
_RESOLVED = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}


class _Resolver(BaseResolver):
    """Gives plain texts their tags."""


for _name, (_pattern, _first) in _RESOLVED.items():
    _Resolver.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), _first)


class _Constructor(SafeConstructor):
    """Makes texts, numbers, lists and mappings, and nothing else."""

    yaml_constructors: ClassVar[dict[str | None, Callable[..., Any]]]

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:  # noqa: ANN401
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError) as error:
            kind = node.tag.removeprefix(_TAG)
            message = f"it is not {_KINDS.get(kind, kind)}: {error}"
            raise ConstructorError(None, None, message, node.start_mark) from error


#: how messages call the kinds of values
_KINDS = {"bool": "true or false", "int": "a whole number", "float": "a number"}


def _make_bool(constructor: SafeConstructor, node: yaml.ScalarNode) -> bool:
    return {"true": True, "false": False}[str(constructor.construct_scalar(node)).lower()]


def _make_int(constructor: SafeConstructor, node: yaml.ScalarNode) -> int:
    text = str(constructor.construct_scalar(node))
    return int(text, 0) if text.startswith(("0x", "0o")) else int(text)


def _make_float(constructor: SafeConstructor, node: yaml.ScalarNode) -> float:
    text = str(constructor.construct_scalar(node)).lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


def _refuse(constructor: SafeConstructor, node: yaml.Node) -> None:
    raise ConstructorError(None, None, f"the tag '{node.tag.replace(_TAG, '!!')}' is not allowed", node.start_mark)


_Constructor.yaml_constructors = {
    f"{_TAG}null": SafeConstructor.construct_yaml_null,
    f"{_TAG}str": SafeConstructor.construct_yaml_str,
    f"{_TAG}seq": SafeConstructor.construct_yaml_seq,
    f"{_TAG}map": SafeConstructor.construct_yaml_map,
    f"{_TAG}bool": _make_bool,
    f"{_TAG}int": _make_int,
    f"{_TAG}float": _make_float,
    None: _refuse,
}

try:
    from yaml.cyaml import CParser  # type: ignore[attr-defined]  # libyaml's, ten times as fast

    class _Loader(CParser, _Constructor, _Resolver):
        def __init__(self, text: str) -> None:
            CParser.__init__(self, text)
            _Constructor.__init__(self)
            _Resolver.__init__(self)

except ImportError:
    from yaml.composer import Composer
    from yaml.parser import Parser
    from yaml.reader import Reader
    from yaml.scanner import Scanner

    class _Loader(Reader, Scanner, Parser, Composer, _Constructor, _Resolver):  # type: ignore[no-redef]
        def __init__(self, text: str) -> None:
            Reader.__init__(self, text)
            Scanner.__init__(self)
            Parser.__init__(self)
            Composer.__init__(self)
            _Constructor.__init__(self)
            _Resolver.__init__(self)


class Source:
    """The values of a benchmark file, with the line and column of each."""

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        #: what is wrong with the file whatever its keys mean, each with its place
        self.faults: list[str] = []
        self.value: Any = None
        self._root: yaml.Node | None = None
        try:
            self._check_depth(text)
            loader = _Loader(text)
            self._root = loader.get_single_node()
            if self._root is None:
                return
            faults = list(_Inspection().look(self._root))  # before constructing, which rewrites merged mappings
            self.faults = [f"{self._at(mark)}: {_path(path)}: {fault}" for mark, path, fault in faults]
            self.value = loader.construct_document(self._root)
        except yaml.MarkedYAMLError as error:
            place = self._at(error.problem_mark or error.context_mark)
            if self.faults:  # the cause, as a list for a key is
                raise self.fail([]) from error
            raise ConfigError(f"{place}: {error.problem or error.context}", "it is not YAML") from error
        except yaml.reader.ReaderError as error:
            before = text[: error.position]
            place = f"{name}:{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"
            raise ConfigError(f"{place}: a character that YAML does not allow", "leave it out") from error

    def _check_depth(self, text: str) -> None:
        depth = 0
        for event in yaml.parse(text, _Loader):  # type: ignore[arg-type]
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                place = self._at(event.start_mark)
                raise ConfigError(f"{place}: lists and mappings stand in each other more than {DEEPEST} deep")

    def _at(self, mark: Any) -> str:  # noqa: ANN401 - PyYAML's or libyaml's mark
        if mark is None:
            return f"{self.name}:1:1"
        return f"{self.name}:{mark.line + 1}:{mark.column + 1}"

    def place(self, location: Sequence[str | int]) -> str:
        """file:line:column of the value at `location`, or of its deepest parent in the file."""
        node = self._root
        for part in location:
            child = _child(node, part)
            if child is None:
                break
            node = child
        return self._at(None if node is None else node.start_mark)

    def fail(self, faults: Sequence[Fault]) -> ConfigError:
        """One error that lists all faults with their places."""
        lines = [f"{self.place(location)}: {_path(location)}: {message}" for location, message in faults]
        return ConfigError("\n".join(dict.fromkeys([*self.faults, *lines])))


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


#: a fault of a node: where it stands, the path to its value, and what is wrong
_Found = tuple[yaml.Mark, Location, str]


class _Inspection:
    """Looks at every node of a file once, however many aliases it has."""

    def __init__(self) -> None:
        #: the number of values in each node seen so far, aliases written out; None while it is being counted
        self._sizes: dict[int, int | None] = {}

    def look(self, node: yaml.Node, location: Location = ()) -> Iterator[_Found]:
        """The faults of a node and of everything below it."""
        self._sizes[id(node)] = None
        if isinstance(node, yaml.MappingNode):
            yield from _faults_of_keys(node, location)
        elif isinstance(node, yaml.ScalarNode) and has_control_characters(node.value):
            yield node.start_mark, location, f"'{visible(node.value)}' has a control character; leave it out"
        size = 1
        for part, child in _children(node):
            if id(child) not in self._sizes:
                yield from self.look(child, (*location, part))
            size += self._size_of(child)
        if size > MOST_VALUES:
            raise ConstructorError(None, None, f"aliases make it more than {MOST_VALUES:,} values", node.start_mark)
        self._sizes[id(node)] = size

    def _size_of(self, node: yaml.Node) -> int:
        size = self._sizes[id(node)]
        if size is None:
            raise ConstructorError(None, None, "an alias stands inside its own anchor", node.start_mark)
        return size


def _children(node: yaml.Node) -> Iterator[tuple[str | int, yaml.Node]]:
    """The values of a mapping by key, or the items of a list by position."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield str(key.value), value
    elif isinstance(node, yaml.SequenceNode):
        yield from enumerate(node.value)


def _faults_of_keys(node: yaml.MappingNode, location: Location) -> Iterator[_Found]:
    """Keys that are given twice, and those that are no texts."""
    seen: set[str] = set()
    for key, _ in node.value:
        name = visible(str(key.value)) if isinstance(key, yaml.ScalarNode) else "a list or mapping"
        if key.tag not in (f"{_TAG}str", f"{_TAG}merge"):
            yield key.start_mark, location, f"the key {name} is no text; a key is a name, in quotes if need be"
        elif has_control_characters(key.value):
            yield key.start_mark, location, f"the key '{name}' has a control character; leave it out"
        elif name in seen:
            yield key.start_mark, (*location, name), "the key is given twice"
        seen.add(name)


def _path(location: Location) -> str:
    return ".".join(str(part) for part in location) or "the file"


def read_value(text: str) -> Any:  # noqa: ANN401
    """The value of a text on a command line, such as `0.1`, `[1, 2]` or `name`; `yaml.YAMLError` if it is not YAML."""
    loader = _Loader(text)
    node = loader.get_single_node()
    return None if node is None else loader.construct_document(node)
