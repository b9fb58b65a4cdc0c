"""What `bbn new` writes: a package of one's own with one component and its contract test."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template

from backdoor_bench_none.errors import ConfigError

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
    """Write the package `bbn-<name>` into `folder`, which must not be there, and return its files."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        raise ConfigError(f"'{name}' is not a name for a component", "lower-case words joined by _, as my_defense")
    if folder.exists():
        raise ConfigError(f"'{folder}' is there already", "choose another name, or another folder with --output")
    words = {
        "kind": kind,
        "kinds": f"{kind}s",
        "name": name,
        "module": f"bbn_{name}",
        "distribution": f"bbn-{name.replace('_', '-')}",
        "Class": "".join(word.capitalize() for word in name.split("_")),
        "Contract": f"{kind.capitalize()}Contract",
    }
    written = []
    for target, template in FILES.items():
        text = (Path(__file__).parent / Template(template).substitute(words)).read_text(encoding="utf-8")
        path = folder / Template(target).substitute(words)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(Template(text).substitute(words), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"'{path}' cannot be written: {error.strerror}") from error
        written.append(path)
    return written
