"""A disk that is full: one message with its numbers, and nothing half-written."""

import errno
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from data_store.files import (
    FullDiskError,
    file_made_whole,
    folder_made_whole,
    full_disk_is_a_user_error,
    show_bytes,
    write_text_atomically,
)
from data_store.prediction_file import write_predictions
from tests.support.small_disk import fill, small_disk


def test_the_message_says_what_is_needed_what_is_free_and_what_to_do(tmp_path: Path):
    path = tmp_path / "folder" / "file"
    with (
        pytest.raises(FullDiskError) as caught,
        full_disk_is_a_user_error(path, needed_bytes=3 << 20),
    ):
        raise OSError(errno.EDQUOT, "whatever")
    said = str(caught.value)
    for part in (str(path), "quota exceeded", "about 3.0 MiB are needed", "are free", "run the"):
        assert part in said


def test_a_folder_that_is_written_to_gives_way_to_the_file_of_the_error(tmp_path: Path):
    file = str(tmp_path / "inside")
    with pytest.raises(FullDiskError, match="disk of .*/inside "):
        with full_disk_is_a_user_error(tmp_path):
            raise OSError(errno.ENOSPC, "full", file)


@pytest.mark.parametrize("kind", [OSError, RuntimeError])
def test_hdf5_says_it_in_words(kind: type[Exception], tmp_path: Path):
    said = "file write failed: file descriptor = 3, errno = 28, error message = 'No space left'"
    with pytest.raises(FullDiskError), full_disk_is_a_user_error(tmp_path):
        raise kind(said)
    with pytest.raises(kind, match="errno = 13"), full_disk_is_a_user_error(tmp_path):
        raise kind(said.replace("28", "13"))


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0 bytes"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB")]
)
def test_bytes_have_a_unit(count: int, shown: str):
    assert show_bytes(count) == shown


def test_what_does_not_fit_is_refused_before_a_byte_is_written(tmp_path: Path):
    path = tmp_path / "file"
    with pytest.raises(FullDiskError, match="GiB are needed"):
        with file_made_whole(path, needed_bytes=1 << 60):
            pytest.fail("begun all the same")
    assert not list(tmp_path.iterdir())


def test_on_a_real_disk_the_old_file_stays_and_nothing_is_half_written(tmp_path: Path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        (disk / "kept").write_text("old")
        ballast = fill(disk, left_bytes=64 << 10)
        with pytest.raises(FullDiskError, match=r"64\.0 KiB are free"):
            write_text_atomically(disk / "kept", "new" * (1 << 20))
        with pytest.raises(FullDiskError), folder_made_whole(disk / "folder") as partial:
            (partial / "a").write_bytes(b"a" * (1 << 20))
        assert sorted(path.name for path in disk.iterdir()) == ["ballast", "kept"]
        assert (disk / "kept").read_text() == "old"
        ballast.unlink()
        write_text_atomically(disk / "kept", "new")
        assert (disk / "kept").read_text() == "new"


def test_predictions_are_whole_or_absent_and_hdf5_does_not_crash(tmp_path: Path):
    values = np.random.default_rng(0).random((500, 60), dtype=np.float32)
    obs = pd.DataFrame({"target_gene": ["a"] * 500}, index=[f"c{i}" for i in range(500)])
    genes = [f"g{i}" for i in range(60)]
    with small_disk(tmp_path / "disk", "4m") as disk:
        path = disk / "predictions.h5ad"
        for left_kib in (16, 100, 130, 160, 1000):
            ballast = fill(disk, left_bytes=left_kib << 10)
            with pytest.raises(FullDiskError, match=r"about 1\.\d MiB are needed"):
                write_predictions(path, [values], genes, obs)
            assert [found.name for found in disk.iterdir()] == ["ballast"]
            ballast.unlink()
        write_predictions(path, [values], genes, obs)
        np.testing.assert_array_equal(ad.read_h5ad(path).X, values)
