"""Embeddings as an h5ad that anndata and scanpy read."""

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from data_store.embedding_file import write_embedding
from data_store.schema import StoreError


def parts_of(folder: Path, values: np.ndarray, *cuts: int) -> list[Path]:
    paths = []
    for number, part in enumerate(np.split(values, cuts)):
        paths.append(folder / f"{number}.npy")
        np.save(paths[-1], part)
    return paths


def test_rows_come_in_the_order_of_the_parts(tmp_path: Path):
    values = np.random.default_rng(0).random((7, 4)).astype(np.float32)
    obs = pd.DataFrame(
        {"cell_type": pd.Categorical(list("abcabca"))}, index=[f"c{i}" for i in range(7)]
    )
    out = tmp_path / "new" / "e.h5ad"
    write_embedding(out, "X_state", parts_of(tmp_path, values, 3, 6), obs, {"run": "r"})
    table = ad.read_h5ad(out)
    np.testing.assert_array_equal(table.obsm["X_state"], values)
    assert table.obsm["X_state"].dtype == np.float32
    pd.testing.assert_frame_equal(table.obs, obs)
    assert table.uns["statewide"]["run"] == "r"


def test_a_missing_row_leaves_the_old_file(tmp_path: Path):
    out = tmp_path / "e.h5ad"
    out.write_text("old")
    parts = parts_of(tmp_path, np.zeros((2, 3), dtype=np.float32), 1)
    with pytest.raises(StoreError, match="2 embedded cells for 3"):
        write_embedding(out, "X_state", parts, pd.DataFrame(index=["a", "b", "c"]), {})
    assert out.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.npy", "1.npy", "e.h5ad"]
