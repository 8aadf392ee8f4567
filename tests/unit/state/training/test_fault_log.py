"""The counters of faults go on over every restart, and say what was lost."""

import os
import time
from pathlib import Path

import pytest

from state.training.fault_log import FaultLog
from state.training.monitor import Monitor, read_metrics


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / ".lock").write_text("host a, process 1\n")
    return tmp_path


def save(run_dir: Path, step: int, at_s: float) -> None:
    commit = run_dir / "checkpoints" / f"step_{step:08d}" / "COMMIT"
    commit.parent.mkdir(parents=True)
    commit.touch()
    os.utime(commit, (at_s, at_s))


def test_the_first_start_is_no_restart(run_dir: Path):
    log = FaultLog(run_dir)
    assert log.count()["faults/restarts"] == 0
    log.begin(0, None)
    assert set(log.count().values()) == {0}


def test_what_the_same_command_lost_is_all_since_the_checkpoint(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    start_s = time.time()
    log = FaultLog(run_dir)
    log.begin(0, None)
    save(run_dir, 6, start_s + 10)
    monkeypatch.setattr("state.training.fault_log.time.time", lambda: start_s + 35)
    log.begin(6, start_s + 12)
    counts = log.count()
    assert counts["faults/restarts"] == 1
    assert counts["faults/seconds_lost"] == pytest.approx(25)
    # Nothing was saved since: it stands still from the last start on.
    monkeypatch.setattr("state.training.fault_log.time.time", lambda: start_s + 45)
    log.begin(6, start_s + 36)
    assert log.count()["faults/seconds_lost"] == pytest.approx(35)


def test_the_time_between_two_commands_is_nobodys_loss(run_dir: Path):
    start_s = time.time()
    log = FaultLog(run_dir)
    log.begin(0, None)
    save(run_dir, 6, start_s + 10)
    (run_dir / ".lock").write_text("host a, process 2\n")
    log.begin(6, start_s + 12)
    assert log.count()["faults/seconds_lost"] == pytest.approx(2, abs=0.1)


def test_counters_survive_what_a_resume_cuts_off(run_dir: Path):
    for first, last in ((0, 5), (3, 8)):
        FaultLog(run_dir).add("shards_repaired", "two", count=2)
        with Monitor(run_dir) as monitor:
            monitor.start(first)
            for step in range(first + 1, last + 1):
                monitor.record(step, {"train/loss": 1.0})
    records = read_metrics(run_dir / "metrics.jsonl")
    assert [record["step"] for record in records] == [*range(1, 9)]
    counted = [
        (record["faults/restarts"], record["faults/shards_repaired"])
        for record in records
        if "faults/restarts" in record
    ]
    assert counted == [(0, 2), (1, 4)]


def test_a_torn_line_is_left_out_and_nothing_stops_training(run_dir: Path, caplog):
    log = FaultLog(run_dir)
    log.add("restart", "one")
    with (run_dir / "logs" / "faults.jsonl").open("a") as handle:
        handle.write('{"kind": "rest')
    log.add("restart", "two")
    assert [fault.message for fault in log.read()] == ["one", "two"]
    (run_dir / "logs" / "faults.jsonl").unlink()
    (run_dir / "logs" / "faults.jsonl").mkdir()
    log.add("restart", "three")
    assert "could not be added to" in caplog.text
