import sys

import pytest

from benchmarks.errors import BenchmarkError
from benchmarks.process_tree import run_tree

MIB = 2**20
HOLD = "import time; held = b'x' * ({mib} << 20); time.sleep({s})"
BURN = "import time\nwhile time.process_time() < {s}: pass"


def start_another(code: str) -> str:
    """Return code that runs other code in a detached process, as Ray starts its workers."""
    return (
        "import subprocess, sys\n"
        f"subprocess.run([sys.executable, '-c', {code!r}], start_new_session=True, check=True)"
    )


def test_the_time_and_memory_of_detached_processes_count(tmp_path):
    code = start_another(BURN.format(s=0.8))
    cost = run_tree([sys.executable, "-c", code], tmp_path / "log")
    assert 0.6 <= cost.cpu_s <= 1.5
    assert cost.wall_s >= 0.8
    code = start_another(HOLD.format(mib=200, s=0.5)) + "\n" + HOLD.format(mib=50, s=0.5)
    cost = run_tree([sys.executable, "-c", code], tmp_path / "log")
    assert 200 * MIB <= cost.peak_process_bytes < 240 * MIB
    # They hold their memory one after the other.
    assert 200 * MIB <= cost.peak_tree_bytes < 250 * MIB


def test_other_processes_do_not_count(tmp_path):
    held = b"x" * (300 * MIB)
    cost = run_tree([sys.executable, "-c", HOLD.format(mib=1, s=0.4)], tmp_path / "log")
    assert len(held) > cost.peak_tree_bytes > 0
    assert cost.cpu_s < 0.3


def test_a_failure_shows_the_end_of_the_log(tmp_path):
    with pytest.raises(BenchmarkError, match=r"status 3:\n(.*\n)*no such atlas"):
        run_tree([sys.executable, "-c", "print('no such atlas'); exit(3)"], tmp_path / "log")
