import json
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import chain, pairwise, repeat
from types import SimpleNamespace

import anndata as ad
import h5py
import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu
from sklearn.linear_model import Ridge

from data_store.atlas_model import (
    CONTROL,
    build_model,
    cut_blocks,
    draw_counts,
    plan_cells,
)
from data_store.schema import StoreError
from data_store.simulate import SimulationSpec, simulate_atlas, truth_path

SMALL = SimulationSpec(num_cells=400, num_genes=50, num_perturbations=12, feature_dim=8, seed=3)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    simulate_atlas(SMALL, folder / "atlas.h5ad", folder / "features.pt")
    return folder


@pytest.fixture(scope="module")
def effects(tmp_path_factory):
    """Return an atlas that is large enough to see its effects, log-normalised."""
    path = tmp_path_factory.mktemp("effects") / "atlas.h5ad"
    spec = SimulationSpec(num_cells=4000, num_genes=400, num_perturbations=50, feature_dim=16)
    simulate_atlas(spec, path, path.with_name("features.pt"))
    atlas = ad.read_h5ad(path)
    counts = atlas.X.toarray()
    values = np.log1p(counts / counts.sum(1, keepdims=True) * np.median(counts.sum(1)))
    with np.load(truth_path(path)) as truth:
        return Effects(
            values=values,
            labels=atlas.obs["target_gene"].to_numpy(),
            names=truth["perturbations"].tolist(),
            genes=truth["genes"].tolist(),
            log2_fold_change=truth["log2_fold_change"],
            features=torch.load(path.with_name("features.pt"), weights_only=True),
        )


class Effects:
    def __init__(self, **fields):
        self.__dict__.update(fields)
        self.control = self.values[self.labels == "non-targeting"]
        means = [self.values[self.labels == name].mean(0) for name in self.names]
        self.delta = np.stack(means) - self.control.mean(0)


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_anndata_opens_the_atlas(small):
    atlas = ad.read_h5ad(small / "atlas.h5ad")
    assert atlas.shape == (400, 50)
    assert atlas.X.has_canonical_format
    assert atlas.X.dtype == np.float32
    # scanpy's compiled code takes one index type only.
    assert atlas.X.indices.dtype == atlas.X.indptr.dtype
    assert np.array_equal(atlas.X.data, np.rint(atlas.X.data))
    assert atlas.X.data.min() >= 1
    assert (atlas.obs["target_gene"] == "non-targeting").sum() == 80
    assert set(atlas.obs["target_gene"]) - {"non-targeting"} <= set(atlas.var_names)
    assert atlas.obs["target_gene"].value_counts().min() >= 3
    assert set(atlas.obs["batch"]) == {"batch_0", "batch_1"}
    assert set(atlas.obs["cell_type"]) == {"line_0"}
    assert json.loads(atlas.uns["simulation"])["seed"] == 3


def test_features_and_truth_cover_the_perturbations(small):
    features = torch.load(small / "features.pt", weights_only=True)
    atlas = ad.read_h5ad(small / "atlas.h5ad")
    with np.load(small / "atlas_truth.npz") as truth:
        assert set(features) == set(truth["perturbations"])
        assert set(features) == set(atlas.obs["target_gene"]) - {"non-targeting"}
        assert truth["log2_fold_change"].shape == (12, 50)
        assert truth["genes"].tolist() == atlas.var_names.tolist()
    assert {(tuple(v.shape), v.dtype) for v in features.values()} == {((8,), torch.float32)}
    assert {v.untyped_storage().nbytes() for v in features.values()} == {8 * 4}


def test_the_same_spec_gives_the_same_bytes(small, tmp_path):
    simulate_atlas(SMALL, tmp_path / "atlas.h5ad", tmp_path / "features.pt")
    assert files_in(tmp_path) == files_in(small) == ["atlas.h5ad", "atlas_truth.npz", "features.pt"]
    with h5py.File(small / "atlas.h5ad") as ours, h5py.File(tmp_path / "atlas.h5ad") as theirs:
        for name in ("data", "indices", "indptr"):
            assert np.array_equal(ours["X"][name], theirs["X"][name])
    for name in ("features.pt", "atlas_truth.npz"):
        assert (small / name).read_bytes() == (tmp_path / name).read_bytes()


def test_another_seed_gives_another_atlas(small, tmp_path):
    simulate_atlas(replace(SMALL, seed=4), tmp_path / "atlas.h5ad")
    ours, theirs = (ad.read_h5ad(f / "atlas.h5ad") for f in (small, tmp_path))
    assert (ours.X != theirs.X).nnz > 0


def test_blocks_are_joined_in_order_whatever_runs_them(tmp_path):
    spec = SimulationSpec(num_cells=1100, num_genes=20, num_perturbations=5)

    def run_backwards(task, items, *, what, unit):
        assert sum(item.num_cells for item in items) == 1100
        done = {item.index: task(item) for item in reversed(items)}
        return (done[item.index] for item in items)

    simulate_atlas(spec, tmp_path / "a.h5ad")
    simulate_atlas(spec, tmp_path / "b.h5ad", run_tasks=run_backwards)
    assert (tmp_path / "a.h5ad").read_bytes() == (tmp_path / "b.h5ad").read_bytes()


def test_each_block_draws_its_own_counts():
    model = build_model(SMALL)
    block = cut_blocks(plan_cells(SMALL), 100)[0]
    again, other = (draw_counts(replace(block, index=i), model=model, seed=3) for i in (0, 1))
    assert (draw_counts(block, model=model, seed=3) != again).nnz == 0
    assert (again != other).nnz > 0


def test_a_tenth_of_the_perturbed_cells_and_all_controls_escape():
    spec = SimulationSpec(num_cells=4000, num_genes=20, num_perturbations=5)
    model = build_model(spec)
    # An effect that kills all expression marks the cells that feel it.
    model = replace(model, log_fold_change_PG=np.full_like(model.log_fold_change_PG, -50.0))
    (block,) = cut_blocks(plan_cells(spec), 4000)
    escaped = draw_counts(block, model=model, seed=0).getnnz(axis=1) > 0
    is_control = block.plan.pert_N == CONTROL
    assert escaped[is_control].all()
    assert escaped[~is_control].mean() == pytest.approx(0.1, abs=0.02)


def test_contexts_have_their_own_baseline_and_controls_everywhere(tmp_path):
    spec = replace(SMALL, num_cells=2000, num_contexts=3, num_batches=6)
    simulate_atlas(spec, tmp_path / "atlas.h5ad")
    atlas = ad.read_h5ad(tmp_path / "atlas.h5ad")
    controls = atlas[atlas.obs["target_gene"] == "non-targeting"]
    strata = controls.obs.groupby(["cell_type", "batch"], observed=True).size()
    assert len(strata) == 18
    assert strata.max() - strata.min() <= 1
    means = [
        np.log1p(np.asarray(controls[controls.obs["cell_type"] == f"line_{c}"].X.mean(0)).ravel())
        for c in range(3)
    ]
    assert all(np.abs(a - b).mean() > 0.1 for a, b in pairwise(means))


def test_targets_are_knocked_down(effects):
    columns = [effects.genes.index(name) for name in effects.names]
    drop = effects.delta[np.arange(len(columns)), columns]
    assert (drop < 0).mean() >= 0.95
    # A fold of 0.2 in nine tenths of the cells: log1p falls by more than a quarter.
    before = effects.control.mean(0)[columns]
    assert np.median(drop / before) < -0.25


def test_true_effects_are_of_realistic_size(effects):
    size = np.abs(effects.log2_fold_change)
    share = ((size >= 0.5) & (size <= 2)).mean(1)
    assert 0.05 <= np.median(share) <= 0.15
    assert np.quantile(share, 0.9) <= 0.2
    assert (size > 3).mean() < 0.001


def test_observed_changes_follow_the_truth(effects):
    changed = np.abs(effects.log2_fold_change) >= 0.5
    r = np.corrcoef(effects.log2_fold_change[changed], effects.delta[changed])[0, 1]
    assert r > 0.8
    assert np.abs(effects.delta[changed]).mean() > 4 * np.abs(effects.delta[~changed]).mean()


def test_a_rank_test_finds_tens_of_genes(effects):
    found = []
    for name in effects.names[:15]:
        cells = effects.values[effects.labels == name]
        p = np.sort(mannwhitneyu(cells, effects.control, axis=0, method="asymptotic").pvalue)
        passed = p <= 0.05 * np.arange(1, len(p) + 1) / len(p)
        found.append(np.flatnonzero(passed).max(initial=-1) + 1)
    assert np.median(found) >= 20
    assert np.median(found) <= 0.3 * len(effects.genes)


def test_effects_of_unseen_perturbations_follow_from_the_features(effects):
    features = np.stack([effects.features[name].numpy() for name in effects.names])
    is_train = np.arange(50) % 5 < 3
    scores = {}
    for what, x in {"told": features, "shuffled": np.roll(features, 7, axis=0)}.items():
        model = Ridge(alpha=10.0).fit(x[is_train], effects.delta[is_train])
        error = np.square(model.predict(x[~is_train]) - effects.delta[~is_train]).sum()
        mean = effects.delta[is_train].mean(0)
        scores[what] = 1 - error / np.square(effects.delta[~is_train] - mean).sum()
    assert scores["told"] > 0.3
    assert scores["shuffled"] < 0.05


def test_no_effect_size_means_no_effect(tmp_path):
    spec = replace(SMALL, effect_size=0.0)
    simulate_atlas(spec, tmp_path / "atlas.h5ad")
    with np.load(tmp_path / "atlas_truth.npz") as truth:
        assert not truth["log2_fold_change"].any()


class TestExistingFiles:
    @pytest.fixture
    def folder(self, tmp_path):
        simulate_atlas(SMALL, tmp_path / "atlas.h5ad", tmp_path / "features.pt")
        return tmp_path

    def test_the_same_simulation_is_not_written_again(self, folder):
        before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
        simulate_atlas(SMALL, folder / "atlas.h5ad", folder / "features.pt")
        assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}

    def test_a_lost_companion_is_written_again(self, folder):
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        (folder / "features.pt").unlink()
        (folder / "atlas_truth.npz").unlink()
        simulate_atlas(SMALL, folder / "atlas.h5ad", folder / "features.pt")
        assert before == {path.name: path.read_bytes() for path in folder.iterdir()}

    def test_another_simulation_is_refused_with_the_difference(self, folder):
        with pytest.raises(StoreError, match=r"atlas\.h5ad.*seed = 3 there, 5 asked"):
            simulate_atlas(replace(SMALL, seed=5), folder / "atlas.h5ad")

    @pytest.mark.parametrize("content", [b"counts of mine", None])
    def test_a_file_of_the_user_is_left_alone(self, tmp_path, content):
        path = tmp_path / "atlas.h5ad"
        if content is None:
            ad.AnnData(np.eye(3, dtype=np.float32)).write_h5ad(path)
        else:
            path.write_bytes(content)
        before = path.read_bytes()
        with pytest.raises(StoreError, match="was not simulated"):
            simulate_atlas(SMALL, path)
        assert path.read_bytes() == before
        assert files_in(tmp_path) == ["atlas.h5ad"]

    @pytest.mark.parametrize("content", ["garbage", "other genes", "other values", "a list"])
    def test_a_features_file_of_the_user_is_left_alone(self, folder, tmp_path, content):
        path = folder / "features.pt"
        features = torch.load(path, weights_only=True)
        if content == "garbage":
            path.write_bytes(b"ESM2")
        elif content == "other genes":
            torch.save({f"{name}x": value for name, value in features.items()}, path)
        elif content == "other values":
            torch.save({name: value + 1 for name, value in features.items()}, path)
        else:
            torch.save([1, 2], path)
        before = path.read_bytes()
        with pytest.raises(StoreError, match=r"features\.pt exists.*features\.path"):
            simulate_atlas(SMALL, folder / "atlas.h5ad", path)
        assert path.read_bytes() == before


def test_a_full_disk_is_noticed_before_hdf5_meets_it(tmp_path, monkeypatch):
    # Room for the first block of cells, and none for what follows.
    free = chain([1 << 30], repeat(1 << 10))
    monkeypatch.setattr(
        "data_store.csr_writer.shutil.disk_usage", lambda _: SimpleNamespace(free=next(free))
    )
    with pytest.raises(StoreError, match=r"no space left.*atlas\.h5ad"):
        simulate_atlas(replace(SMALL, num_cells=1100), tmp_path / "atlas.h5ad")
    assert files_in(tmp_path) == ["atlas_truth.npz"]


def test_an_interrupted_simulation_leaves_no_atlas(tmp_path):
    def fail_late(task, items, *, what, unit):
        yield task(items[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate_atlas(SMALL, tmp_path / "atlas.h5ad", run_tasks=fail_late)
    assert files_in(tmp_path) == ["atlas_truth.npz"]
    simulate_atlas(SMALL, tmp_path / "atlas.h5ad")
    assert ad.read_h5ad(tmp_path / "atlas.h5ad").n_obs == 400


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_perturbations": 51}, r"num_perturbations = 51.*num_genes = 50"),
        ({"num_cells": 40}, r"num_cells = 40 leaves 32 cells.*12 perturbations.*36"),
        ({"num_batches": 81}, r"80 control cells.*81 pairs"),
        ({"control_fraction": 0.001}, r"0 control cells"),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(StoreError, match=message):
        replace(SMALL, **change)


def test_the_least_cells_are_enough(tmp_path):
    spec = SimulationSpec(num_cells=8, num_genes=2, num_perturbations=2, feature_dim=1)
    simulate_atlas(spec, tmp_path / "atlas.h5ad", tmp_path / "features.pt")
    assert ad.read_h5ad(tmp_path / "atlas.h5ad").n_obs == 8


def test_a_killed_simulation_leaves_no_atlas_and_the_next_one_clears_up(tmp_path):
    path = tmp_path / "atlas.h5ad"
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from data_store.simulate import SimulationSpec, simulate_atlas\n"
        "def die_late(task, items, *, what, unit):\n"
        "    yield task(items[0])\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        f"simulate_atlas({SMALL!r}, Path(sys.argv[1]), run_tasks=die_late)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.glob(".*.partial")
    assert not path.exists()
    others = tmp_path / ".atlas.h5ad.1.partial"
    with h5py.File(others, "w"):
        # Someone writes it: HDF5 holds its lock.
        simulate_atlas(SMALL, path)
        assert others.exists()
    assert not left.exists()
    assert ad.read_h5ad(path).n_obs == 400


@pytest.mark.parametrize("compression", ["gzip", "lzf", "none"])
def test_any_compression_holds_the_same_counts(small, tmp_path, compression):
    spec = replace(SMALL, count_type="uint16")
    simulate_atlas(spec, tmp_path / "atlas.h5ad", compression=compression)
    ours, theirs = (ad.read_h5ad(f / "atlas.h5ad").X for f in (small, tmp_path))
    assert theirs.dtype == np.uint16
    assert (ours != theirs).nnz == 0
    with h5py.File(tmp_path / "atlas.h5ad") as file:
        assert file["X/data"].compression == (None if compression == "none" else compression)
    backed = ad.read_h5ad(tmp_path / "atlas.h5ad", backed="r")
    assert np.array_equal(backed.X[5:7].toarray(), ours[5:7].toarray())
    backed.file.close()
