"""From stores to micro-batches of SE: resumable, the same on any number of ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data_store.schema import run_in_process
from launcher.embed_batches import build_embed_source, prefetch, spread_seeds
from launcher.embed_data import compute_frequency, known_tokens, list_gene_names, open_datasets
from launcher.training import Place
from state.config import ConfigError
from state.embedding.vocabulary import load_vocabulary
from state.recipe import load_embed_config
from tests.support.embed_runs import write_embed_recipe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_embed_recipe(tmp_path_factory.mktemp("se"))


def open_source(recipe: Path, *overrides: str, rank=0, world_size=1, micro_batch_size=8):
    config = load_embed_config(recipe, overrides)
    vocabulary = load_vocabulary(config.genes.tables)
    datasets = open_datasets(config, vocabulary)
    settings = config.train.model_copy(update={"micro_batch_size": micro_batch_size})
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


def test_gene_frequencies_are_those_of_the_training_cells(recipe: Path):
    config = load_embed_config(recipe)
    vocabulary = load_vocabulary(config.genes.tables)
    datasets = open_datasets(config, vocabulary)
    frequency = compute_frequency(datasets, len(vocabulary.names), run_in_process)
    expressed = np.concatenate(
        [(d.store.read_counts(0, d.store.num_cells)[d.train_rows] > 0).toarray() for d in datasets]
    )
    np.testing.assert_allclose(frequency[:50], expressed.mean(0)[:50], rtol=1e-6)
    assert frequency[50:].tolist() == [0, 0]
    assert len(known_tokens(datasets)) == 50
    assert all(not set(d.train_rows) & set(d.val_rows) for d in datasets)


def test_a_gene_column_that_is_not_there_is_named(recipe: Path):
    config = load_embed_config(recipe, ["datasets.two.gene_column=ensembl"])
    with pytest.raises(ConfigError, match=r"datasets.two.gene_column = 'ensembl'"):
        open_datasets(config, load_vocabulary(config.genes.tables))


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
