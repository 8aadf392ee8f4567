"""Embeddings read in blocks from one or several files, and what is refused."""

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from data_store.embedding_reader import open_embedding
from data_store.schema import StoreError


def write(path: Path, values: np.ndarray, *, prefix: str = "c", **obs) -> Path:
    names = [f"{prefix}{number}" for number in range(values.shape[0])]
    table = ad.AnnData(obs=pd.DataFrame(obs, index=names), obsm={"X_state": values})
    (table.write_zarr if path.suffix == ".zarr" else table.write_h5ad)(path)
    return path


def draw(num_cells: int, width: int = 3) -> np.ndarray:
    return np.random.default_rng(num_cells).standard_normal((num_cells, width)).astype(np.float32)


@pytest.mark.filterwarnings("ignore:Writing zarr v2 data will no longer be the default")
def test_files_of_both_kinds_are_read_one_below_the_other(tmp_path: Path):
    one, two = draw(7), draw(5).astype(np.float64)
    write(tmp_path / "1.h5ad", one, label=list("abcabca"))
    write(tmp_path / "2.zarr", two, prefix="d", label=["a", "nan", None, "", "b"])
    found = open_embedding(tmp_path, "X_state", "label")
    blocks = list(found.iterate(3))
    assert [len(block) for block in blocks] == [3, 3, 1, 3, 2]
    np.testing.assert_allclose(np.concatenate(blocks), np.concatenate([one, two]), rtol=1e-6)
    assert found.cells[[0, 6, 7]].tolist() == ["c0", "c6", "d0"]
    assert found.labels is not None
    assert found.labels[6:].tolist() == ["a", "a", None, None, None, "b"]
    assert open_embedding(tmp_path / "1.h5ad", "X_state", None).labels is None


@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, "not finite for cell 'c4'"), (np.inf, "not finite"), (0, "only zeros")],
)
def test_vectors_without_a_direction_are_refused(tmp_path: Path, value: float, message: str):
    values = draw(6)
    values[4] = value
    found = open_embedding(write(tmp_path / "e.h5ad", values), "X_state", None)
    with pytest.raises(StoreError, match=message):
        list(found.iterate(2))


def test_what_is_no_embedding_is_named(tmp_path: Path):
    path = write(tmp_path / "e.h5ad", draw(4), cell_type=list("abab"))
    with pytest.raises(StoreError, match=r"no obsm\['X_stat'\]; did you mean 'X_state'"):
        open_embedding(path, "X_stat", None)
    with pytest.raises(StoreError, match="no column 'celltype'.*did you mean 'cell_type'"):
        open_embedding(path, "X_state", "celltype")
    optional = open_embedding(path, "X_state", "celltype", label_is_optional=True)
    assert optional.labels is None
    with pytest.raises(StoreError, match="absent.h5ad is not there"):
        open_embedding(tmp_path / "absent.h5ad", "X_state", None)
    with pytest.raises(StoreError, match="holds no cell"):
        open_embedding(write(tmp_path / "empty.h5ad", draw(4)[:0]), "X_state", None)
    for values, message in (
        (sp.csr_matrix(draw(4)), "csr_matrix"),
        (np.full((4, 2), True), "bool"),
        (np.ones((4, 2, 2)), "shape"),
    ):
        with pytest.raises(StoreError, match=message):
            open_embedding(write(tmp_path / "odd.h5ad", values), "X_state", None)


def test_repeated_names_and_differing_widths_are_refused(tmp_path: Path):
    write(tmp_path / "1.h5ad", draw(4))
    write(tmp_path / "2.h5ad", draw(5))
    with pytest.raises(StoreError, match=r"4 cell names .* c0, c1, c2, c3\..*several files"):
        open_embedding(tmp_path, "X_state", None)
    write(tmp_path / "2.h5ad", draw(5, width=4), prefix="d")
    with pytest.raises(StoreError, match="3 wide in .*1.h5ad, 4 in .*2.h5ad"):
        open_embedding(tmp_path, "X_state", None)
