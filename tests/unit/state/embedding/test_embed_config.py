"""Recipes of SE: presets, messages, and that no key is dead."""

import ast
import functools
from pathlib import Path

import pytest
from pydantic import BaseModel

from state.config import ConfigError
from state.embed_config import (
    DatasetConfig,
    EmbedConfig,
    EmbedLossConfig,
    EmbedModelConfig,
    GeneTableConfig,
    SequenceConfig,
)
from state.recipe import (
    dump_config,
    load_config,
    load_embed_config,
    load_resolved_config,
    load_resolved_embed_config,
)

REPO_ROOT = Path(__file__).resolve().parents[4]
MINIMAL = """
name = "r"
output_dir = "out"
[datasets.blood]
store = "stores/blood"
[datasets.skin]
store = "stores/skin"
weight = 2.0
[genes]
tables = ["t.pt"]
"""
SECTIONS = (DatasetConfig, GeneTableConfig, SequenceConfig, EmbedModelConfig, EmbedLossConfig)
KEYS = sorted({key for section in (*SECTIONS, EmbedConfig) for key in section.model_fields})


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(MINIMAL)
    return path


@functools.cache
def attributes_read() -> frozenset[str]:
    paths = [*(REPO_ROOT / "state" / "embedding").glob("*.py")]
    paths += (REPO_ROOT / "launcher").glob("embed_*.py")
    paths += [REPO_ROOT / "launcher" / "train_job.py", REPO_ROOT / "launcher" / "train_worker.py"]
    trees = [ast.parse(path.read_text()) for path in paths]
    return frozenset(
        node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)
    )


@pytest.mark.parametrize("key", KEYS)
def test_no_key_is_dead(key: str):
    assert key in attributes_read()


@pytest.mark.parametrize("section", [*SECTIONS, EmbedConfig])
def test_every_key_is_documented(section: type[BaseModel]):
    assert [name for name, field in section.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("preset", "width", "layers", "numbers"),
    [("se_tiny", 64, 2, 74), ("se_small", 672, 8, 682), ("se_600m", 2048, 16, 2058)],
)
def test_presets_have_their_sizes(recipe: Path, preset: str, width: int, layers: int, numbers: int):
    include = f'include = ["{REPO_ROOT}/configs/model/{preset}.toml"]\n'
    recipe.write_text(include + MINIMAL)
    model = load_embed_config(recipe).model
    assert (model.hidden_dim, model.num_layers) == (width, layers)
    assert model.output_dim + model.dataset_dim == numbers


def test_the_shipped_recipe_is_valid(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STATEWIDE_DATA", "/data")
    config = load_embed_config(REPO_ROOT / "configs" / "se_pbmc3k.toml")
    assert config.train.deepspeed.is_file()
    assert config.genes.tables[0].is_absolute()


def test_a_resolved_config_reads_back_unchanged(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    config = load_embed_config(recipe, ["data.target_sum=1e4"])
    assert config.datasets["blood"].store == tmp_path / "stores" / "blood"
    (tmp_path / "config.toml").write_text(dump_config(config))
    assert load_resolved_embed_config(tmp_path / "config.toml") == config
    assert list(config.datasets) == ["blood", "skin"]


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["model.hidden_dimm=3"], ["unknown key 'model.hidden_dimm'", "model.hidden_dim"]),
        (["datasets.blood.weights=3"], ["'datasets.blood.weights'", "datasets.blood.weight"]),
        (["datasets.blood.weight=0"], ["datasets.blood.weight = 0", "greater than 0"]),
        (["model.num_heads=5"], ["num_heads = 5 does not divide hidden_dim = 672"]),
        (["model.norm=mid"], ["model.norm = 'mid'", "post"]),
        (["genes.tables=[]"], ["genes.tables"]),
        (["train.freeze=['cell_encoder', 'head']"], ["'cell_encoder'", "backbone, head, decoder"]),
        (["loss.dataset_weight=0"], ["loss.dataset_weight = 0", "several"]),
        (["loss.shared_weight=0"], ["loss.shared_weight = 0"]),
        (
            ["data.num_expressed=0", "data.num_unexpressed=0", "data.num_shared=0"],
            ["all 0"],
        ),
    ],
)
def test_mistakes_are_named(recipe: Path, overrides: list[str], parts: list[str]):
    with pytest.raises(ConfigError) as caught:
        load_embed_config(recipe, overrides)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_what_both_models_have_may_be_frozen(recipe: Path):
    freeze = load_embed_config(recipe, ["train.freeze=['head', 'decoder']"]).train.freeze
    assert freeze == ("head", "decoder")


def test_the_other_models_recipe_and_run_folder_are_named(recipe: Path, tmp_path: Path):
    """With the command that takes them."""
    st_recipe = tmp_path / "st.toml"
    st_recipe.write_text('name = "s"\noutput_dir = "out"\n[data]\ninput = "a.h5ad"\n')
    runs = {}
    for name, config in (("se", load_embed_config(recipe)), ("st", load_config(st_recipe))):
        runs[name] = tmp_path / name / "config.toml"
        runs[name].parent.mkdir()
        runs[name].write_text(dump_config(config))
    with pytest.raises(ConfigError, match=r"st is a run of ST.*statewide predict .*/st --out"):
        load_resolved_embed_config(runs["st"])
    with pytest.raises(ConfigError, match=r"se is a run of SE.*statewide embed apply .*/se INPUT"):
        load_resolved_config(runs["se"])
    with pytest.raises(ConfigError, match=r"recipe of ST.*statewide run .*st.toml"):
        load_embed_config(st_recipe)
    with pytest.raises(ConfigError, match=r"recipe of SE.*statewide embed train .*recipe.toml"):
        load_config(recipe)
