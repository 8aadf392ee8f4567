"""The cells whose type is known, and scores that tell a good space from a bad one."""

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from benchmarks.se_cells import KEY, LABEL, find_labelled, main, score_neighbours


def test_cells_without_a_label_are_left_out():
    """A lost label is missing, or the text that a CSV made of it."""
    column = pd.Series(["B", "nan", None, "NK"], dtype="category")
    assert find_labelled(column).tolist() == [True, False, False, True]
    assert find_labelled(column.astype(object)).tolist() == [True, False, False, True]


def test_neighbours_know_the_types_of_a_space_that_parts_them():
    labels = np.repeat(["a", "b"], 100)
    noise = np.random.default_rng(0).normal(size=(200, 4))
    parted = noise + 10 * (labels == "b")[:, None]
    assert score_neighbours(parted, labels, "accuracy") == (1.0, 0.0)
    assert score_neighbours(noise, labels, "balanced_accuracy")[0] < 0.7


def write_cells(path: Path, *, labels: bool = False, embedded: bool = False) -> str:
    cells = ad.AnnData(np.ones((2, 3), np.float32), obs=pd.DataFrame(index=["c0", "c1"]))
    if labels:
        cells.obs[LABEL] = ["B", "NK"]
    if embedded:
        cells.obsm[KEY] = np.zeros((2, 2), np.float32)
    cells.write_h5ad(path)
    return str(path)


def test_input_that_cannot_be_used_is_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    plain = write_cells(tmp_path / "plain.h5ad")
    labelled = write_cells(tmp_path / "labelled.h5ad", labels=True)
    (tmp_path / "text.h5ad").write_text("no HDF5")
    for arguments, message in (
        ([], "the following arguments are required: RAW.h5ad, EMBEDDED.h5ad"),
        ([str(tmp_path / "none.h5ad"), plain], "none.h5ad cannot be read as h5ad"),
        ([str(tmp_path / "text.h5ad"), plain], "text.h5ad cannot be read as h5ad"),
        ([plain, plain], f"no column '{LABEL}' in obs"),
        ([labelled, plain], f"no '{KEY}' in obsm"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        printed = capsys.readouterr().err
        assert message in printed
        assert printed.splitlines()[-1].startswith("python -m benchmarks.se_cells: ")
