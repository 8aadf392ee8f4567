"""Predicted cells written block after block come back as one matrix, or not at all."""

import shutil
import weakref
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from data_store import files
from data_store.prediction_file import write_predictions
from data_store.schema import StoreError

GENES = ("A", "B", "C", "D")


def make_cells(num_cells, share_of_zeros):
    rng = np.random.default_rng(0)
    values = rng.gamma(1, 1, (num_cells, len(GENES))).astype(np.float32)
    values[rng.random(values.shape) < share_of_zeros] = 0
    return values, pd.DataFrame({"target_gene": [f"P{i % 3}" for i in range(num_cells)]}).rename(
        index=str
    )


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix])
@pytest.mark.parametrize("rows_per_block", [1, 7, 40])
@pytest.mark.parametrize("share_of_zeros", [0.1, 0.9])
def test_predictions_come_back(tmp_path, form, rows_per_block, share_of_zeros):
    values, obs = make_cells(40, share_of_zeros)
    path = tmp_path / "new" / "pred.h5ad"
    blocks = (form(values[i : i + rows_per_block]) for i in range(0, 40, rows_per_block))
    write_predictions(path, blocks, GENES, obs)
    adata = ad.read_h5ad(path)
    assert tuple(adata.var_names) == GENES
    pd.testing.assert_frame_equal(adata.obs, obs, check_categorical=False, check_dtype=False)
    assert adata.X.dtype == np.float32
    assert np.array_equal(adata.to_df().to_numpy(), values)
    assert [entry.name for entry in path.parent.iterdir()] == ["pred.h5ad"]


@pytest.mark.parametrize(("num_zeros", "is_sparse"), [(5, False), (6, False), (7, True)])
def test_predictions_are_written_in_the_form_that_is_smaller_for_the_first_block(
    tmp_path, num_zeros, is_sparse
):
    first = np.arange(1, 13, dtype=np.float32).reshape(3, 4) / 2
    first.ravel()[:num_zeros] = 0
    last = np.full((1, 4), 0.5 if is_sparse else 0, np.float32)
    obs = pd.DataFrame(index=list("abcd"))
    write_predictions(tmp_path / "pred.h5ad", [first, last], GENES, obs)
    adata = ad.read_h5ad(tmp_path / "pred.h5ad")
    assert sp.issparse(adata.X) == is_sparse
    assert np.array_equal(adata.to_df().to_numpy(), np.concatenate([first, last]))


def test_one_block_is_held_at_a_time(tmp_path):
    values, obs = make_cells(30, 0.1)
    written: list[weakref.ref[np.ndarray]] = []

    def blocks():
        for first in range(0, 30, 10):
            assert all(block() is None for block in written[:-1])
            block = values[first : first + 10].copy()
            written.append(weakref.ref(block))
            yield block

    write_predictions(tmp_path / "pred.h5ad", blocks(), GENES, obs)
    assert len(written) == 3


@pytest.mark.parametrize("share_of_zeros", [0.1, 0.9])
def test_a_full_disk_leaves_the_old_prediction(tmp_path, monkeypatch, share_of_zeros):
    path = tmp_path / "pred.h5ad"
    path.write_bytes(b"old")
    full = SimpleNamespace(disk_usage=lambda folder: shutil.disk_usage(folder)._replace(free=1000))
    monkeypatch.setattr(files, "shutil", full)
    values, obs = make_cells(40, share_of_zeros)
    with pytest.raises(StoreError, match=r"no space left.*pred\.h5ad.*MiB are needed, 1000"):
        write_predictions(path, [values], GENES, obs)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["pred.h5ad"]


@pytest.mark.parametrize("num_cells", [39, 41])
def test_blocks_that_do_not_fill_obs_are_refused(tmp_path, num_cells):
    values, _ = make_cells(num_cells, 0.9)
    _, obs = make_cells(40, 0.9)
    with pytest.raises(ValueError, match=rf"{num_cells} predicted cells for 40 rows of obs"):
        write_predictions(tmp_path / "pred.h5ad", [values], GENES, obs)
    assert not list(tmp_path.iterdir())
