"""Labels, the keep filter and library sizes from ``obs``, and their error messages."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data_store.obs_labels import (
    read_cell_labels,
    read_labels,
    read_library_sizes,
    select_cells,
)
from data_store.schema import ObsColumns, StoreError

PATH = Path("atlas.h5ad")


@pytest.fixture
def obs():
    return pd.DataFrame(
        {
            "target_gene": pd.Categorical(
                ["b", "non-targeting", "B", "a"],
                categories=["unused", "b", "B", "a"] + ["non-targeting"],
            ),
            "assigned": [True, False, True, True],
            "lane": [1, 2, 2, 10],
            "dose": [1.0, 0.5, 1.0, np.nan],
            "depth": [10.0, 0.0, 5.5, 3.0],
        },
        index=["c0", "c1", "c2", "c3"],
    )


def test_labels_are_sorted_by_code_point_and_unused_ones_dropped(obs):
    labels = read_labels(obs, "target_gene", "data.pert_col", PATH)
    assert labels.names == ("B", "a", "b", "non-targeting")
    assert [labels.names[code] for code in labels.codes] == ["b", "non-targeting", "B", "a"]


def test_numbers_become_strings(obs):
    assert read_labels(obs, "lane", "data.batch_col", PATH).names == ("1", "10", "2")


@pytest.mark.parametrize(
    ("keep", "rows"),
    [
        ({}, [0, 1, 2, 3]),
        ({"assigned": [True]}, [0, 2, 3]),
        ({"assigned": ["True"]}, [0, 2, 3]),
        ({"lane": [2, "10"], "assigned": [True]}, [2, 3]),
        ({"dose": [1]}, [0, 2]),
        ({"target_gene": ["a", "b"]}, [0, 3]),
    ],
)
def test_keep(obs, keep, rows):
    assert select_cells(obs, keep, PATH).tolist() == rows


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"assign": [True]}, r"'assign' \(data.keep.assign\).*did you mean 'assigned'"),
        ({"target_gene": ["non-targetting"]}, "did you mean 'non-targeting'"),
        ({"lane": [1], "assigned": [False]}, "leaves none of the 4 cells"),
        ({"lane": []}, "leaves none of the 4 cells"),
    ],
)
def test_keep_errors(obs, keep, message):
    with pytest.raises(StoreError, match=message):
        select_cells(obs, keep, PATH)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pert_col": "target_gen"}, r"'target_gen' \(data.pert_col\).*did you mean 'target_gene'"),
        ({"batch_col": "zzz"}, r"'zzz' \(data.batch_col\) is not in atlas.h5ad\. Columns: target_"),
        ({"cell_type_key": "dose"}, r"1 of 4 cells have no value.*data.cell_type_key"),
        ({"control_pert": "non_targeting"}, r"data.control_pert.*'non-targeting'\? Labels: B, a"),
    ],
)
def test_label_errors(obs, changes, message):
    with pytest.raises(StoreError, match=message):
        read_cell_labels(obs, ObsColumns(**changes), PATH)


def test_controls_alone_are_refused(obs):
    with pytest.raises(StoreError, match="all cells of atlas.h5ad are controls"):
        read_cell_labels(obs.iloc[[1, 1]], ObsColumns(), PATH)


def test_library_sizes(obs):
    assert read_library_sizes(obs, "depth", PATH).tolist() == [10.0, 0.0, 5.5, 3.0]
    with pytest.raises(StoreError, match="did you mean 'depth'"):
        read_library_sizes(obs, "deph", PATH)
    with pytest.raises(StoreError, match="holds category values"):
        read_library_sizes(obs, "target_gene", PATH)
    with pytest.raises(StoreError, match="holds nan for cell 'c3'"):
        read_library_sizes(obs, "dose", PATH)
    obs["depth"] -= 1
    with pytest.raises(StoreError, match="holds -1.0 for cell 'c1'"):
        read_library_sizes(obs, "depth", PATH)
