"""budget.memory: how it is written, and that a process which wants more gets an error of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from backdoor_bench_none.contracts.config import Config
from backdoor_bench_none.errors import ConfigError
from backdoor_bench_none.planning.reading import parse_config

BENCHMARK = """\
version: 1
name: test
matrix:
  attack: [clean]
  defense: [none]
  architecture: [mlp]
budget:
  cell_timeout: 90m
"""


def parse(memory: str) -> Config:
    return parse_config(f"{BENCHMARK}  memory: {memory}\n", "b.yaml")[0]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4G", 4 * 2**30),
        ("4GB", 4 * 2**30),
        ("4GiB", 4 * 2**30),
        ("4 g", 4 * 2**30),
        ("1.5G", 3 * 2**29),
        ("500M", 500 * 2**20),
        ("999999k", 999999 * 2**10),
        ("2T", 2 * 2**40),
        ("1234567890", 1234567890),
    ],
)
def test_a_size_in_bytes(text: str, size: int) -> None:
    budget = parse(text).budget
    assert (budget.memory, budget.cell_timeout) == (size, 5400)


def test_there_is_no_limit_unless_asked_for() -> None:
    assert parse_config(BENCHMARK)[0].budget.memory is None
    assert parse("null").budget.memory is None


@pytest.mark.parametrize("text", ["4X", "G", "four", "-4G", "4G8M", "4Gi b", "'4'", "1e3M"])
def test_what_is_no_size_is_refused_where_it_stands(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    said = text.strip("'")
    assert caught.value.message == f"b.yaml:9:11: budget.memory: '{said}' is not a size such as 500M, 4G or 4GiB"


@pytest.mark.parametrize("text", ["0", "0G", "-1", "[4G]"])
def test_a_size_that_cannot_be_is_refused_where_it_stands(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^b\.yaml:9:11: budget\.memory: Input should be "):
        parse(text)


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory on Linux only")
def test_beyond_the_limit_an_allocation_fails_and_the_process_lives_on(tmp_path: Path) -> None:
    """It is given 1 GiB more than it has; nothing that is allocated is ever written to."""
    code = """
    import resource
    from pathlib import Path
    import numpy as np
    from backdoor_bench_none.executors.local import limit_memory

    status = Path("/proc/self/status").read_text()
    used = 1024 * int(status.partition("VmData:")[2].split()[0])
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit_memory(None)
    np.empty(2**32, dtype=np.uint8)
    limit_memory(used + 2**30)
    small = np.empty(2**28, dtype=np.uint8)
    try:
        np.empty(2**31, dtype=np.uint8)
    except MemoryError as error:
        print("MemoryError", len(small), resource.getrlimit(resource.RLIMIT_DATA)[1] == hard)
    print(Path("/proc/self/oom_score_adj").read_text())
    """
    command = [sys.executable, "-c", dedent(code)]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True).stdout
    assert said.split() == ["MemoryError", str(2**28), "True", "900"]
