"""Each key of ``[data]`` that shapes a store reaches it, and the stage that makes it."""

import io
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from rich.console import Console

from data_store.locate import describe_input
from data_store.preprocess import preprocess
from launcher.errors import LaunchError
from launcher.pipeline import Pipeline
from launcher.preprocess_job import build_spec, describe_store, refuse_other_spec
from launcher.progress import Reporter
from launcher.ray_cluster import ThisProcess
from launcher.run_inputs import find_missing_inputs
from launcher.stages import fingerprint
from launcher.store_report import describe_fully
from state.config import DataConfig, RunConfig
from state.model_config import ModelConfig
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
KEY = "X_emb"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_atlas(tmp_path_factory.mktemp("atlas") / "atlas.h5ad", num_cells=120)


def stage_fingerprint(data: DataConfig, folder: Path, embed_key: str | None = None) -> str:
    model = ModelConfig(embed_key=embed_key)
    config = RunConfig(name="r", output_dir=folder, data=data, model=model)
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


@pytest.fixture
def embedded(source, tmp_path) -> Path:
    """The cells' embedding, in a file of its own."""
    cells = ad.read_h5ad(source)
    path = tmp_path / "embedded.h5ad"
    ad.AnnData(obs=cells.obs[[]], obsm={KEY: np.ones((120, 4))}).write_h5ad(path)
    return path


def test_an_embedding_makes_another_store_and_none_leaves_the_stage_as_it_was(
    source, embedded, tmp_path
):
    data = DataConfig(input=source)
    asked = data.model_copy(update={"embed_file": embedded})
    prints = [stage_fingerprint(asked, tmp_path, KEY), stage_fingerprint(asked, tmp_path, "X_two")]
    embedded.touch()
    prints += [stage_fingerprint(asked, tmp_path, KEY), stage_fingerprint(data, tmp_path, KEY)]
    prints.append(stage_fingerprint(data, tmp_path))
    assert len(set(prints)) == 5
    used = {key: getattr(data, key) for key in CHANGES} | {"input": str(source)}
    assert prints[-1] == fingerprint("preprocess", used, describe_input(source))


def test_a_store_must_hold_the_embedding_that_is_asked_for(source, embedded, tmp_path):
    data = DataConfig(input=source, n_top_genes=9, embed_file=embedded)
    store = preprocess(build_spec(data, tmp_path / "store", KEY))
    with pytest.raises(LaunchError, match="embedded.*is read when a store is made"):
        refuse_other_spec(data, store, KEY)
    data = data.model_copy(update={"embed_file": None})
    refuse_other_spec(data, store, KEY)
    # What is not asked for does no harm.
    refuse_other_spec(data, store)
    with pytest.raises(LaunchError, match=r"embed_key = 'X_pca'.* holds 'X_emb'.*--embed-key"):
        refuse_other_spec(data, store, "X_pca")
    plain = preprocess(build_spec(DataConfig(input=source, n_top_genes=9), tmp_path / "plain"))
    with pytest.raises(LaunchError, match="holds no embedding"):
        refuse_other_spec(data, plain, KEY)
    assert f"obsm/{KEY}" in describe_fully(store)
    assert "obsm" not in describe_fully(plain)
    facts, before = describe_store(store), describe_store(plain)
    assert (facts["embedding"], before["embedding"]) == (f"{KEY} of 4", "none")


def test_a_missing_file_of_the_embedding_is_named_and_a_present_one_is_never_deleted(
    source, embedded, tmp_path
):
    folder = tmp_path / "run"
    reporter = Reporter(Console(file=io.StringIO()))

    def pipeline_of(embed_file: Path) -> Pipeline:
        data = DataConfig(input=source, embed_file=embed_file)
        model = ModelConfig(embed_key=KEY)
        config = RunConfig(name="r", output_dir=folder, data=data, model=model)
        return Pipeline(config, ThisProcess(reporter), reporter)

    absent = find_missing_inputs(pipeline_of(tmp_path / "embedded2.h5ad").config)
    assert "data.embed_file" in absent[0]
    assert "did you mean 'embedded.h5ad'" in absent[0]
    assert "embed_file" not in " ".join(find_missing_inputs(pipeline_of(embedded).config))
    # In what --overwrite empties.
    inside = folder / "store" / "embedded.h5ad"
    inside.parent.mkdir(parents=True)
    embedded.rename(inside)
    pipeline = pipeline_of(inside)
    with pytest.raises(LaunchError, match="would delete the input .*embedded.h5ad"):
        pipeline.folder._refuse_to_delete_inputs(pipeline.config)
