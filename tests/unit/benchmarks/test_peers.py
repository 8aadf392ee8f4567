"""What runs in a peer's own environment: our packages are not there, and one shares its name."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks

FOLDER = Path(benchmarks.__path__[0])
# Import each module with nothing of ours but ``benchmarks`` in reach.
IMPORT_ALONE = """
import sys

class Elsewhere:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("data_store", "launcher", "state"):
            raise ModuleNotFoundError(f"{name} is not in this environment")

sys.meta_path.insert(0, Elsewhere())
for module in sys.argv[1:]:
    __import__(module)
"""


def modules_of_peers() -> set[str]:
    """Return the modules of the tasks that sides with an environment of their own run."""
    found = set()
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id == "Side"
                and any(keyword.arg == "environment" for keyword in node.keywords)
            ):
                task = node.args[1]
                assert isinstance(task, ast.Name), f"{path.name}:{node.lineno}: no plain name"
                module = importlib.import_module(f"benchmarks.{path.stem}")
                found.add(getattr(module, task.id).__module__)
    return found


def test_the_tasks_of_peers_need_nothing_of_ours():
    modules = modules_of_peers()
    assert len(modules) > 4
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALONE, *sorted(modules)],
        cwd=FOLDER.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_module_of_ours_would_be_seen():
    with pytest.raises(subprocess.CalledProcessError, match="non-zero"):
        subprocess.run(
            [sys.executable, "-c", IMPORT_ALONE, "benchmarks.errors"],
            cwd=FOLDER.parent,
            stderr=subprocess.DEVNULL,
            timeout=120,
            check=True,
        )
