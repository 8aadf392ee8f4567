"""Sub-runs: one for each fold and seed, of one split, one store, and nothing of the parent's."""

from pathlib import Path

import pytest

from launcher.repeats import list_sub_runs
from state.config import ConfigError, RunConfig
from state.recipe import load_config
from tests.support.runs import write_recipe


def config_of(tmp_path: Path, *overrides: str) -> RunConfig:
    return load_config(write_recipe(tmp_path), overrides)


def test_there_is_a_run_for_each_fold_and_seed(tmp_path: Path):
    config = config_of(tmp_path, "evaluate.folds=3", "evaluate.seeds=[5, 6]", "seed=7")
    sub_runs = list_sub_runs(config)
    assert [(sub.fold, sub.seed) for sub in sub_runs] == [
        *((0, 5), (1, 5), (2, 5)),
        *((0, 6), (1, 6), (2, 6)),
    ]
    assert len({sub.config.output_dir for sub in sub_runs}) == 6
    for sub in sub_runs:
        assert sub.config.seed == sub.seed
        assert (sub.config.split.folds, sub.config.split.fold) == (3, sub.fold)
        # One division of the perturbations for all seeds, so that seeds can be compared.
        assert sub.config.split.seed == 7
        assert sub.config.data.input == config.output_dir / "store"
        assert not sub.config.evaluate.has_repeats
        assert sub.config.simulate is None
        assert sub.config.model == config.model


def test_runs_beside_are_those_of_the_same_fold_and_seed(tmp_path: Path):
    keys = ["model.embed_key=X_state", f"data.embed_file={tmp_path / 'e.h5ad'}"]
    beside = f"evaluate.beside=['{tmp_path / 'other'}']"
    first, second = list_sub_runs(config_of(tmp_path, "evaluate.folds=2", beside, *keys))
    assert second.config.evaluate.beside == (
        tmp_path / "other/runs" / second.config.output_dir.name,
    )
    assert first.config.evaluate.beside != second.config.evaluate.beside
    # The embedding is in the store that all share.
    assert first.config.data.embed_file is None
    assert first.config.model.embed_key == "X_state"


def test_seeds_alone_keep_the_recipes_split(tmp_path: Path):
    config = config_of(tmp_path, "evaluate.seeds=[1, 2]", "split.seed=3")
    first, second = list_sub_runs(config)
    assert first.config.split == second.config.split == config.split
    assert first.config.output_dir.name == "seed1"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("evaluate.folds=5", "split.folds=5"), "evaluate.folds and split.folds each say"),
        (("evaluate.folds=1",), "evaluate.folds"),
        (("evaluate.seeds=[1, 1]",), "names one twice"),
    ],
)
def test_repeats_that_make_no_sense_are_refused(
    overrides: tuple[str, ...], message: str, tmp_path: Path
):
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path, *overrides)
