"""Records of a run on a disk that is full for a while."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_store.files import FullDiskError
from state.training.monitor import Monitor, read_metrics
from tests.support.small_disk import fill, small_disk


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    ("left_bytes", "name"), [(0, "metrics.jsonl"), (100 << 10, "metrics.jsonl|tb/train")]
)
def test_records_go_on_when_there_is_room_again(left_bytes: int, name: str, tmp_path: Path):
    def record(first: int, last: int) -> None:
        with Monitor(disk) as monitor:
            monitor.start(first)
            for step in range(first + 1, last + 1):
                monitor.record(step, {"train/loss": float(step)})

    with small_disk(tmp_path / "disk", "1m") as disk:
        record(0, 5)
        ballast = fill(disk, left_bytes)
        with pytest.raises(FullDiskError, match=name):
            record(5, 5000)
        ballast.unlink()
        kept = steps_of(disk)
        assert kept == list(range(1, len(kept) + 1))
        assert len(kept) >= 5
        record(5, 8)
        assert steps_of(disk) == [*range(1, 9)]
        shown = EventAccumulator(str(disk / "tb" / "train")).Reload().Scalars("train/loss")
        assert [point.step for point in shown] == [*range(1, 9)]


def steps_of(run_dir: Path) -> list[float]:
    records = read_metrics(run_dir / "metrics.jsonl")
    return [record["step"] for record in records if "train/loss" in record]
