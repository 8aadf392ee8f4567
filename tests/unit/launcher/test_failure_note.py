"""A worker's note to the driver, on a disk that may be full."""

from pathlib import Path

import pytest

from data_store.files import FullDiskError
from launcher.failure_note import FailureNote
from launcher.run_folder import RunFolder
from tests.support.small_disk import fill, small_disk


def test_a_note_is_read_until_the_next_training_begins(tmp_path: Path):
    note = FailureNote(RunFolder(tmp_path))
    note.prepare()
    assert note.read() is None
    FailureNote(RunFolder(tmp_path)).write("the reason")
    assert note.read() == "the reason"
    note.close()
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["train_failure.txt"]
    note.prepare()
    assert note.read() is None


def test_a_full_disk_has_room_for_one_note(tmp_path: Path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        note = FailureNote(RunFolder(disk))
        note.prepare()
        fill(disk)
        note.write("the disk is full")
        assert note.read() == "the disk is full"
        fill(disk)
        with pytest.raises(FullDiskError):
            note.write("x" * (1 << 20))
        assert note.read() == "the disk is full"
