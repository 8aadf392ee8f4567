"""From stores to micro-batches of SE: resumable, the same on any number of ranks."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from data_store.row_reader import StoreRows
from data_store.schema import run_in_process
from launcher.embed_batches import build_embed_source, prefetch, spread_seeds
from launcher.embed_data import compute_levels, known_tokens, list_gene_names, open_datasets
from launcher.training import Place
from state.config import ConfigError
from state.embedding.vocabulary import load_vocabulary
from state.recipe import load_embed_config
from tests.support.embed_runs import write_embed_recipe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_embed_recipe(tmp_path_factory.mktemp("se"))


def open_source(
    recipe: Path, *overrides: str, rank=0, world_size=1, micro_batch_size=8, grad_accum_steps=1
):
    config = load_embed_config(recipe, overrides)
    vocabulary = load_vocabulary(config.genes.tables)
    datasets = open_datasets(config, vocabulary)
    settings = config.train.model_copy(
        update={"micro_batch_size": micro_batch_size, "grad_accum_steps": grad_accum_steps}
    )
    place = Place(rank, world_size, CPU)
    return build_embed_source(config, settings, datasets, vocabulary.tie_rank_V, place)


def take(source, number: int, *, position: int = 0):
    with source.open_train(position) as batches:
        return [next(batches) for _ in range(number)]


def same(one, two) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


def pad(batch, width: int):
    """Return the cells of a batch as rows that do not depend on the longest sequence."""
    genes = np.pad(batch.gene_BL, [(0, 0), (0, width - batch.gene_BL.shape[1])])
    return np.hstack([genes, batch.asked_BK, batch.target_BK, batch.dataset_B[:, None]])


def test_a_resumed_stream_goes_on_where_it_stopped(recipe: Path):
    whole = take(open_source(recipe), 6)
    rest = take(open_source(recipe), 3, position=24)
    assert all(same(a, b) for a, b in zip(whole[3:], rest, strict=True))


@pytest.mark.parametrize("override", ["data.prefetch_batches=0", "data.resident_gib=0"])
def test_how_data_are_read_does_not_change_them(recipe: Path, override: str):
    expected, other = take(open_source(recipe), 4), take(open_source(recipe, override), 4)
    assert all(same(a, b) for a, b in zip(expected, other, strict=True))


def test_two_ranks_see_what_one_sees(recipe: Path):
    one = take(open_source(recipe), 3)
    ranks = [
        take(open_source(recipe, rank=rank, world_size=2, micro_batch_size=4), 3) for rank in (0, 1)
    ]
    for whole, *parts in zip(one, *ranks, strict=True):
        together = np.concatenate([pad(part, 20) for part in parts])
        np.testing.assert_array_equal(pad(whole, 20), together)


@pytest.mark.parametrize("override", ["data.resident_gib=4", "data.resident_gib=0"])
def test_accumulated_micro_batches_are_those_of_two_ranks(recipe: Path, override: str):
    """Also what is drawn for an optimiser step, and across the ends of epochs and windows."""
    alone = open_source(recipe, override, micro_batch_size=4, grad_accum_steps=2)
    accumulated = take(alone, 60)
    for rank in (0, 1):
        other = open_source(recipe, override, rank=rank, world_size=2, micro_batch_size=4)
        assert all(same(a, b) for a, b in zip(accumulated[rank::2], take(other, 30), strict=True))
    asked = [batch.asked_BK[:, -6:] for batch in accumulated]
    assert all((one == two).all() for one, two in zip(asked[::2], asked[1::2], strict=True))
    assert any((one != two).any() for one, two in zip(asked[::2], asked[2::2], strict=False))


def test_a_window_is_read_once(recipe: Path, monkeypatch: pytest.MonkeyPatch):
    """An epoch of 180 cells is one window: 3 readings of each store in 52 micro-batches of 8."""
    reads = []
    take_rows = StoreRows.take_count_rows

    def spy(self, rows, *arguments):
        reads.append(len(rows))
        return take_rows(self, rows, *arguments)

    monkeypatch.setattr(StoreRows, "take_count_rows", spy)
    take(open_source(recipe, "data.resident_gib=0", "data.prefetch_batches=0"), 52)
    assert len(reads) == 3 * 2


def test_datasets_come_by_weight(recipe: Path):
    """By weight 108 to 100: dataset one has 108 training cells, and two the weight 100."""
    batches = take(open_source(recipe), 26)
    shares = np.bincount(np.concatenate([batch.dataset_B for batch in batches])) / 208
    np.testing.assert_allclose(shares, [108 / 208, 100 / 208], atol=0.1)


def test_validation_is_the_same_each_time_and_at_any_number_of_ranks(recipe: Path):
    source = open_source(recipe)
    one, two = list(source.iterate_val()), list(source.iterate_val())
    assert all(same(a[0], b[0]) for a, b in zip(one, two, strict=True))
    assert sum(weight.sum() for _, weight in one) == 20
    rows = sorted(tuple(row) for b, w in one for row in pad(b, 20)[w > 0])
    ranks = [
        list(open_source(recipe, rank=r, world_size=2, micro_batch_size=4).iterate_val())
        for r in (0, 1)
    ]
    divided = sorted(tuple(row) for rank in ranks for b, w in rank for row in pad(b, 20)[w > 0])
    assert rows == divided


def test_genes_without_a_token_are_not_read(recipe: Path):
    for batch in take(open_source(recipe), 5):
        assert batch.gene_BL.max() < 50
        assert batch.asked_BK.max() < 50


@pytest.mark.parametrize("target_sum", [None, 100.0])
def test_gene_levels_are_those_of_the_training_cells(recipe: Path, target_sum: float | None):
    config = load_embed_config(recipe)
    vocabulary = load_vocabulary(config.genes.tables)
    datasets = open_datasets(config, vocabulary)
    levels = compute_levels(datasets, len(vocabulary.names), target_sum, run_in_process)
    counts = np.concatenate(
        [d.store.read_counts(0, d.store.num_cells)[d.train_rows].toarray() for d in datasets]
    )[:, :50].astype(np.float64)
    np.testing.assert_allclose(levels.frequency_V[:50], (counts > 0).mean(0), rtol=1e-6)
    assert levels.frequency_V[50:].tolist() == [0, 0]
    if target_sum is not None:
        counts *= target_sum / counts.sum(1, keepdims=True)
    mean_log = np.log1p(counts).mean(0)
    np.testing.assert_allclose(levels.mean_log_V[:50], mean_log, rtol=1e-6)
    np.testing.assert_allclose(levels.mean_log_V[50:], mean_log.mean(), rtol=1e-6)
    assert len(known_tokens(datasets)) == 50
    assert all(not set(d.train_rows) & set(d.val_rows) for d in datasets)


def test_a_gene_column_that_is_not_there_is_named(recipe: Path):
    config = load_embed_config(recipe, ["datasets.two.gene_column=ensembl"])
    with pytest.raises(ConfigError, match=r"datasets.two.gene_column = 'ensembl'"):
        open_datasets(config, load_vocabulary(config.genes.tables))


def test_a_var_without_columns_has_its_index():
    with pytest.raises(ConfigError, match=r"--gene-column = 'symbol'.*none besides its index"):
        list_gene_names(pd.DataFrame(index=["A"]), "symbol", "--gene-column")


def test_text_columns_of_var_are_candidates(recipe: Path):
    config = load_embed_config(recipe)
    var = open_datasets(config, load_vocabulary(config.genes.tables))[0].store.read_var()
    var["gene_id"] = [f"ENSG{number}" for number in range(len(var))]
    assert list(list_gene_names(var, None, "key")) == ["index", "gene_id"]
    assert list(list_gene_names(var, "gene_id", "key")) == ["gene_id"]


def test_no_two_cells_draw_from_the_same_stretch_of_random_numbers():
    """The generator adds one number at each draw: how many draws lie between two seeds?"""
    inverse = np.uint64(pow(0x9E3779B97F4A7C15, -1, 2**64))
    seeds = spread_seeds(0, 0, range(10_000))
    apart = ((seeds[1:] - seeds[0]) * inverse).view(np.int64)
    assert np.abs(apart.astype(np.float64)).min() > 1e9


def test_an_error_of_the_loader_reaches_the_loop():
    def fail(item: int) -> int:
        if item == 2:
            raise OSError("disk")
        return item

    batches = prefetch(fail, range(5), 2)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(OSError, match="disk"):
        next(batches)
