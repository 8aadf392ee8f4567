"""Each key of ``[data]`` that shapes a store reaches it, and the stage that makes it."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from data_store.preprocess import preprocess
from launcher.errors import LaunchError
from launcher.pipeline import Pipeline
from launcher.preprocess_job import build_spec, refuse_other_spec
from launcher.progress import Reporter
from launcher.ray_cluster import ThisProcess
from state.config import DataConfig, RunConfig
from tests.support.atlas import write_atlas

# Another value than the default for each key.
CHANGES = {
    "pert_col": "gene",
    "control_pert": "scrambled",
    "cell_type_key": "cell_type",
    "batch_col": "batch",
    "library_size_col": "depth",
    "keep": {"batch": ["batch_0"]},
    "n_top_genes": 7,
    "layer": "counts",
    "genes": "union",
    "hvg_flavor": "cell_ranger",
    "hvg_batch_key": "batch",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_atlas(tmp_path_factory.mktemp("atlas") / "atlas.h5ad", num_cells=120)


def stage_fingerprint(data: DataConfig, folder: Path) -> str:
    config = RunConfig(name="r", output_dir=folder, data=data)
    reporter = Reporter(Console(file=io.StringIO()))
    return Pipeline(config, ThisProcess(reporter), reporter)._build("preprocess").fingerprint


def test_all_keys_that_shape_a_store_are_tried_here(source, tmp_path):
    assert CHANGES.keys() == build_spec(DataConfig(input=source), tmp_path).describe().keys()


@pytest.mark.parametrize("key", CHANGES)
def test_a_changed_key_makes_another_store(source, tmp_path, key):
    plain = DataConfig(input=source)
    changed = DataConfig(input=source, **{key: CHANGES[key]})
    assert build_spec(changed, tmp_path).describe()[key] == CHANGES[key]
    assert stage_fingerprint(changed, tmp_path) != stage_fingerprint(plain, tmp_path)


def test_a_finished_store_of_genes_chosen_otherwise_is_refused(source, tmp_path):
    data = DataConfig(input=source, n_top_genes=9, hvg_batch_key="batch")
    store = preprocess(build_spec(data, tmp_path / "store"))
    refuse_other_spec(data, store)
    other = data.model_copy(update={"hvg_flavor": "seurat_v3", "hvg_batch_key": None})
    with pytest.raises(LaunchError) as caught:
        refuse_other_spec(other, store)
    assert "data.hvg_flavor: 'seurat' in the store, 'seurat_v3' in the recipe" in str(caught.value)
    assert "data.hvg_batch_key: 'batch' in the store, None in the recipe" in str(caught.value)
