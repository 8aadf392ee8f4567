"""The calibration ``vcc`` against the challenge's published figures, at sizes that tests can have.

What does not depend on the number of cells is measured on 600 cells and all genes; the extremes
are measured over all 221,273 cells, on a sample of genes.
"""

from dataclasses import fields, replace

import anndata as ad
import numpy as np
import pytest

from data_store.atlas_model import build_model, cut_blocks, draw_counts, plan_cells
from data_store.expression_source import open_expression
from data_store.gene_statistics import compute_gene_statistics
from data_store.preprocess import PreprocessSpec, preprocess
from data_store.schema import ObsColumns, run_in_process
from data_store.simulate import SimulationSpec, simulate_atlas
from state.config_simulate import PRESETS
from tests.support.data import data_path

SPEC = SimulationSpec(**PRESETS["vcc"])
MEAN, MAX, MIN, NEVER = 3.147, 32.04, 0.00752, 0.000221
LOG_MEAN = 0.7704
DENSITY, MEDIAN_UMIS = 0.47, 54_000


@pytest.fixture(scope="module")
def model():
    return build_model(SPEC)


@pytest.fixture(scope="module")
def statistics(tmp_path_factory):
    """Return what ``statewide stats`` computes, of raw counts and after preprocessing."""
    folder = tmp_path_factory.mktemp("vcc")
    simulate_atlas(replace(SPEC, num_cells=600), folder / "atlas.h5ad")
    spec = PreprocessSpec(folder / "atlas.h5ad", folder / "store", ObsColumns(), None, {}, 500, 512)
    preprocess(spec)
    return folder, *(
        compute_gene_statistics(open_expression(folder / name), run_in_process, rows_per_block=512)
        for name in ("atlas.h5ad", "store")
    )


def test_means_and_density_are_the_published_ones(statistics):
    _, raw, normalised = statistics
    assert raw.summary()["Mean of gene means"] == pytest.approx(MEAN, rel=0.05)
    assert normalised.summary()["Mean of gene means"] == pytest.approx(LOG_MEAN, rel=0.05)
    assert raw.nnz / (600 * 18_080) == pytest.approx(DENSITY, abs=0.03)


def test_cells_have_the_published_depth(statistics):
    folder, *_ = statistics
    atlas = ad.read_h5ad(folder / "atlas.h5ad")
    assert atlas.X.dtype == np.uint16
    umis = np.asarray(atlas.X.sum(1, dtype=np.int64)).ravel()
    assert np.median(umis) == pytest.approx(MEDIAN_UMIS, rel=0.05)


def test_as_many_genes_are_silent_as_published(model):
    assert np.isneginf(model.log_mean_G).mean() == pytest.approx(NEVER, abs=1e-6)
    assert not np.isneginf(model.log_mean_G[model.target_P]).any()


def test_extremes_over_all_cells_are_the_published_ones(model):
    order = np.argsort(model.log_mean_G)
    # Only the highest genes are seen in every cell: they are sampled more closely.
    bulk, top = np.array_split(order[:-200], 40), np.array_split(order[-200:], 20)
    genes = np.array([part[len(part) // 2] for part in (*bulk, *top)])
    weight = np.array([len(part) for part in (*bulk, *top)]) / len(order)
    sampled = {
        field.name: getattr(model, field.name)[..., genes]
        for field in fields(model)
        if field.name.endswith("G")
    }
    part = replace(model, **sampled)
    largest, smallest = np.zeros(len(genes)), np.full(len(genes), np.inf)
    for block in cut_blocks(plan_cells(SPEC), 20_000):
        counts = draw_counts(block, model=part, seed=1)
        largest = np.maximum(largest, counts.max(axis=0).toarray().ravel())
        smallest = np.minimum(smallest, counts.min(axis=0).toarray().ravel())
    assert weight @ largest == pytest.approx(MAX, rel=0.1)
    assert weight @ smallest == pytest.approx(MIN, rel=0.6)


def test_cells_per_perturbation_spread_like_the_challenge():
    counts = np.sort(np.bincount(plan_cells(SPEC).pert_N + 1)[1:])
    assert counts.sum() == 183_097
    with data_path("vcc/pert_counts_Training.derived.csv").open() as handle:
        rows = [line.strip().split(",") for line in handle][1:]
    real = np.sort([int(count) for label, count in rows if label != "non-targeting"])
    for share in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert np.quantile(counts, share) == pytest.approx(np.quantile(real, share), rel=0.15)
