"""What the training loop gets of a store: the same tensors from counts and from dense arrays."""

import time
from functools import partial
from itertools import islice
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch

import launcher.batches
from data_store import row_reader
from data_store.embedding_scale import measure_embedding
from data_store.preprocess import PreprocessSpec, preprocess
from data_store.schema import CellCounts, ObsColumns
from data_store.shared_copies import SharedCopies
from data_store.simulate import SimulationSpec, simulate_atlas
from data_store.splits import make_random_splits, split_rows
from launcher.batches import build_batch_source
from state.batch_tensors import to_device
from state.config import RunConfig

CPU = torch.device("cpu")
SPLITS = partial(make_random_splits, train=0.6, val=0.2, seed=0, controls="partition", drop=())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("store")
    spec = SimulationSpec(num_cells=600, num_genes=60, num_perturbations=10)
    simulate_atlas(spec, folder / "atlas.h5ad")
    columns = ObsColumns(batch_col="batch")
    atlas = ad.read_h5ad(folder / "atlas.h5ad")
    atlas.obsm["X_emb"] = np.random.default_rng(0).normal(size=(600, 7)).astype(np.float32)
    atlas.write_h5ad(folder / "atlas.h5ad")
    counts = (folder / "atlas.h5ad", folder / "store", columns, None, {}, 20, 200)
    return preprocess(PreprocessSpec(*counts, embed_key="X_emb"))


@pytest.fixture
def copies_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copies = SharedCopies(tmp_path, left_free_bytes=0)
    monkeypatch.setattr(launcher.batches, "SharedCopies", lambda: copies)
    return tmp_path


def build(store, space: str, *, as_counts: bool, world_size: int = 1, **settings):
    config = RunConfig.model_validate(
        {
            "name": "tiny",
            "output_dir": "unused",
            "data": {"input": str(store.path), "batch_col": "batch", **settings.pop("data", {})},
            "model": {"output_space": space, "cell_set_len": 16, **settings},
            "train": {"micro_batch_size": 2, "val_max_sets": 5},
        }
    )
    splits = SPLITS(store)
    return build_batch_source(
        config, config.train, store, splits, 0, world_size, as_counts=as_counts
    )


def train_batches(source):
    with source.open_train(4) as batches:
        return list(islice(batches, 6))


@pytest.mark.parametrize("space", ["all", "hvg"])
def test_counts_and_dense_arrays_train_and_validate_the_same(store, space):
    dense, counts = (build(store, space, as_counts=as_counts) for as_counts in (False, True))
    pairs = list(zip(train_batches(counts), train_batches(dense), strict=True))
    pairs += [
        (ours, theirs)
        for (ours, _), (theirs, _) in zip(counts.iterate_val(), dense.iterate_val(), strict=True)
    ]
    for ours, theirs in pairs:
        # X_hvg is stored dense, so there is nothing to save.
        assert isinstance(ours.target_BSG, CellCounts) == (space == "all")
        for mine, other in zip(to_device(ours, CPU), to_device(theirs, CPU), strict=True):
            assert torch.equal(mine, other)


def test_ranks_share_a_copy_and_a_lone_worker_has_its_own(store, copies_folder: Path):
    alone = build(store, "all", as_counts=False)
    assert not list(copies_folder.glob("*/*.copy"))
    ranks = [build(store, "all", as_counts=False, world_size=2) for _ in range(2)]
    assert len(list(copies_folder.glob("*/*.copy"))) == 1
    (ours, *_), (theirs, *_) = train_batches(ranks[0]), train_batches(alone)
    # Of two ranks the first has the first sets too.
    assert torch.equal(to_device(ours, CPU)[1], to_device(theirs, CPU)[1])
    del ranks
    # A thread that reads ahead may hold a batch for a moment longer.
    deadline = time.monotonic() + 30
    while list(copies_folder.glob("*/*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not list(copies_folder.glob("*/*"))


@pytest.mark.parametrize("resident_gib", [4.0, 0.0])
@pytest.mark.parametrize("space", ["all", "hvg", "embedding"])
def test_an_embedding_comes_with_the_genes_it_is_decoded_to(store, space, resident_gib):
    # In the model's units, which the train controls give.
    embedding = store.read_matrix("embedding")
    _, control_rows = split_rows(store, SPLITS(store), "train")
    measure_embedding(store, control_rows).standardize(embedding)
    genes = build(store, "hvg" if space == "embedding" else space, as_counts=False)
    settings = {"embed_key": "X_emb", "data": {"resident_gib": resident_gib}}
    for as_counts in (False, True):
        source = build(store, space, as_counts=as_counts, **settings)
        pairs = list(zip(train_batches(source), train_batches(genes), strict=True))
        pairs += [
            (ours, theirs)
            for (ours, _), (theirs, _) in zip(
                source.iterate_val(), genes.iterate_val(), strict=True
            )
        ]
        for ours, theirs in pairs:
            mine, other = to_device(ours, CPU), to_device(theirs, CPU)
            # The same cells and controls: an embedding that no other cell has tells which.
            assert torch.equal(mine[2], other[2])
            assert mine[0].shape[-1] == mine[1].shape[-1] == embedding.shape[1]
            values = store.read_matrix("all" if space == "all" else "hvg")
            for side in (0, 1):
                rows = rows_of(mine[side][mine[2]].numpy(), embedding)
                assert np.array_equal(other[side][other[2]].numpy(), values[rows])
            if space == "embedding":
                assert mine[5].shape[-1] == 0
            else:
                assert torch.equal(mine[5], other[1])
                assert isinstance(ours.genes_BSJ, CellCounts) == (as_counts and space == "all")


def rows_of(values, embedding):
    """Find which cells have these embeddings; empty slots are none."""
    rows = (values[:, None] == embedding).all(-1)
    assert (rows.sum(1) == 1).all()
    return rows.argmax(1)


def test_the_memory_is_shared_by_embedding_and_genes(store, monkeypatch):
    budgets = []

    def open_rows(*arguments, resident_gib, **others):
        budgets.append((arguments[1], resident_gib))
        return row_reader.open_rows(*arguments, resident_gib=resident_gib, **others)

    monkeypatch.setattr(launcher.batches, "open_rows", open_rows)
    build(store, "hvg", as_counts=False, embed_key="X_emb", data={"resident_gib": 1e-4})
    (_, first), (space, second) = budgets
    assert space == "hvg"
    assert 0 <= second < first == 1e-4
    budgets.clear()
    build(store, "embedding", as_counts=False, embed_key="X_emb")
    assert [space for space, _ in budgets] == ["embedding"]


def test_ranks_share_a_copy_of_the_embedding_and_one_of_the_genes(store, copies_folder: Path):
    sources = [
        build(store, "hvg", as_counts=False, world_size=2, embed_key="X_emb") for _ in range(2)
    ]
    assert len(list(copies_folder.glob("*/*.copy"))) == 2
    del sources
    assert not list(copies_folder.glob("*/*"))
