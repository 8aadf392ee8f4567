"""What the training loop gets of a store: the same tensors from counts and from dense arrays."""

from itertools import islice
from pathlib import Path

import pytest
import torch

import launcher.batches
from data_store.preprocess import PreprocessSpec, preprocess
from data_store.schema import CellCounts, ObsColumns
from data_store.shared_copies import SharedCopies
from data_store.simulate import SimulationSpec, simulate_atlas
from data_store.splits import make_random_splits
from launcher.batches import build_batch_source
from state.batch_tensors import to_device
from state.config import RunConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("store")
    spec = SimulationSpec(num_cells=600, num_genes=60, num_perturbations=10)
    simulate_atlas(spec, folder / "atlas.h5ad")
    columns = ObsColumns(batch_col="batch")
    return preprocess(
        PreprocessSpec(folder / "atlas.h5ad", folder / "store", columns, None, {}, 20, 200)
    )


@pytest.fixture
def copies_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copies = SharedCopies(tmp_path, left_free_bytes=0)
    monkeypatch.setattr(launcher.batches, "SharedCopies", lambda: copies)
    return tmp_path


def build(store, space: str, *, as_counts: bool, world_size: int = 1):
    config = RunConfig.model_validate(
        {
            "name": "tiny",
            "output_dir": "unused",
            "data": {"input": str(store.path), "batch_col": "batch"},
            "model": {"output_space": space, "cell_set_len": 16},
            "train": {"micro_batch_size": 2, "val_max_sets": 5},
        }
    )
    splits = make_random_splits(store, train=0.6, val=0.2, seed=0, controls="partition", drop=())
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
    assert not list(copies_folder.glob("*/*"))
