import sys

import pytest

from benchmarks import environments, harness
from benchmarks.errors import BenchmarkError
from benchmarks.harness import Side, run_side
from tests.support.benchmark_tasks import burn


@pytest.fixture
def peers(tmp_path, monkeypatch):
    monkeypatch.setenv("STATEWIDE_PEERS", str(tmp_path))
    monkeypatch.setattr(
        environments, "REQUIREMENTS", {"empty": ("pip",), "wrong": ("no-such-package @ file:///x",)}
    )
    return tmp_path


def test_an_environment_is_made_once(peers, monkeypatch):
    python = environments.interpreter("empty")
    assert python.is_file()
    assert python.is_relative_to(peers)
    monkeypatch.setattr(environments, "_run", lambda command, name: pytest.fail("made again"))
    assert environments.interpreter("empty") == python


def test_a_failed_installation_says_why_and_leaves_nothing(peers):
    with pytest.raises(BenchmarkError, match=r"(?s)'wrong' could not be made.*file:///x"):
        environments.interpreter("wrong")
    assert [path.name for path in peers.iterdir()] == ["wrong.lock"]


def test_a_peer_sees_nothing_of_this_repository_but_the_benchmarks(monkeypatch):
    monkeypatch.setattr(harness, "interpreter", lambda name: sys.executable)
    run_side(Side("ours", burn, {"cpu_s": 0.0}))
    with pytest.raises(BenchmarkError, match="No module named 'tests'"):
        run_side(Side("peer", burn, {"cpu_s": 0.0}, environment="arc"))
