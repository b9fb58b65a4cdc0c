"""The package that `bbn new` writes: one component and its contract test."""

from __future__ import annotations

import re
from keyword import iskeyword
from pathlib import Path
from string import Template

from backdoor_bench_none.errors import ConfigError
from backdoor_bench_none.registry.plugins import BUILTINS

KINDS = ("attack", "defense", "architecture")
#: file in the package -> template beside this module
FILES = {
    "pyproject.toml": "pyproject.toml.txt",
    "README.md": "README.md.txt",
    "src/${module}/__init__.py": "init.py.txt",
    "src/${module}/${name}.py": "${kind}.py.txt",
    "tests/test_contract.py": "test_contract.py.txt",
}


def write_package(kind: str, name: str, folder: Path) -> list[Path]:
    """Write the package `bbn-<name>` into `folder`, which must not exist, and return its files."""
    _check_name(kind, name)
    if folder.exists():
        raise ConfigError(f"'{folder}' already exists", "choose another name, or another folder with --output")
    words = {
        "kind": kind,
        "kinds": f"{kind}s",
        "name": name,
        "module": f"bbn_{name}",
        "distribution": f"bbn-{name.replace('_', '-')}",
        "Class": _class_of(name),
        "Contract": f"{kind.capitalize()}Contract",
    }
    written = []
    for target, template in FILES.items():
        text = _read(Template(template).substitute(words))
        path = folder / Template(target).substitute(words)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(Template(text).substitute(words), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"'{path}' cannot be written: {error.strerror}") from error
        written.append(path)
    return written


def _check_name(kind: str, name: str) -> None:
    """Raise `ConfigError` for an invalid name, or one that clashes with a name in the written files."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or iskeyword(name):
        raise ConfigError(
            f"'{name}' is not a name for a component", "use lower-case words joined by _, such as my_defense"
        )
    imported = re.search(rf"^from .*\b{_class_of(name)}\b", _read(f"{kind}.py.txt"), re.MULTILINE)
    if f"bbn_{name}" in BUILTINS or imported:
        raise ConfigError(f"'{name}' is the name of something else in backdoor-bench-none", "choose another name")


def _class_of(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("_"))


def _read(template: str) -> str:
    return (Path(__file__).parent / template).read_text(encoding="utf-8")
