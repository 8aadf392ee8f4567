"""Recipes: merging, overrides, messages, and that no key is dead."""

import ast
import functools
from pathlib import Path

import pytest
from pydantic import BaseModel

from state.config import ConfigError, RunConfig
from state.recipe import describe_differences, dump_config, load_config, load_resolved_config

REPO_ROOT = Path(__file__).resolve().parents[3]
MINIMAL = 'name = "r"\noutput_dir = "out"\n[data]\ninput = "a.h5ad"\n'


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(MINIMAL)
    return path


def leaves(model: type[BaseModel], prefix: str = "") -> list[str]:
    found = []
    for name, field in model.model_fields.items():
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        nested = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        found += leaves(nested[0], f"{prefix}{name}.") if nested else [f"{prefix}{name}"]
    return found


@functools.cache
def attributes_read() -> frozenset[str]:
    """Names that code other than the config's own reads as ``something.name``."""
    read: set[str] = set()
    for package in ("data_store", "state", "launcher"):
        for path in (REPO_ROOT / package).rglob("*.py"):
            if path.parent.name == "state" and path.name in ("config.py", "model_config.py"):
                tree = ast.parse(path.read_text())
                # Only what config turns into another object counts as a use.
                uses = ("columns", "gene_space")
                nodes = [n for n in ast.walk(tree) if getattr(n, "name", "") in uses]
            else:
                nodes = [ast.parse(path.read_text())]
            for node in nodes:
                read |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
    return frozenset(read)


@pytest.mark.parametrize("key", leaves(RunConfig))
def test_no_key_is_dead(key: str):
    assert key.rsplit(".", 1)[-1] in attributes_read()


def test_every_key_is_documented():
    for key in leaves(RunConfig):
        model: type[BaseModel] = RunConfig
        *sections, last = key.split(".")
        for section in sections:
            annotation = model.model_fields[section].annotation
            candidates = [annotation, *getattr(annotation, "__args__", ())]
            model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
        if key not in ("data", "simulate"):
            assert model.model_fields[last].description, key


def test_overrides_win_over_the_recipe_and_the_recipe_over_includes(tmp_path: Path):
    (tmp_path / "base.toml").write_text("[model]\nhidden_dim = 64\nnum_heads = 4\nffn_dim = 10\n")
    path = tmp_path / "recipe.toml"
    path.write_text('include = ["base.toml"]\n' + MINIMAL + "[model]\nffn_dim = 20\n")
    model = load_config(path, ["model.hidden_dim=32", "name=other"]).model
    assert (model.hidden_dim, model.num_heads, model.ffn_dim) == (32, 4, 20)


def test_a_resolved_config_reads_back_unchanged(recipe: Path, tmp_path: Path):
    config = load_config(recipe, ["data.keep={assigned=['True']}", "train.lr=3e-4"])
    (tmp_path / "config.toml").write_text(dump_config(config))
    assert load_resolved_config(tmp_path / "config.toml") == config


def test_paths_become_absolute_and_variables_are_expanded(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOMEWHERE", "/elsewhere")
    config = load_config(recipe, ["data.input=${SOMEWHERE}/a.h5ad"])
    assert config.data.input == Path("/elsewhere/a.h5ad")
    assert config.output_dir == tmp_path / "out"
    assert config.train.deepspeed == tmp_path / "deepspeed/zero1.json"


def test_an_input_may_be_a_url_or_a_glob(recipe: Path, tmp_path: Path):
    url = "https://example.org/atlas.h5ad"
    config = load_config(recipe, [f"data.input={url}", "data.layer=counts", "data.genes=union"])
    assert (config.data.input, config.data.layer, config.data.genes) == (url, "counts", "union")
    (tmp_path / "config.toml").write_text(dump_config(config))
    assert load_resolved_config(tmp_path / "config.toml") == config
    assert load_config(recipe, ["data.input=/d/{a,b}*.h5ad"]).data.input == Path("/d/{a,b}*.h5ad")


SIMULATE = "simulate={num_cells=9, num_genes=9, num_perturbations=2}"


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ([SIMULATE, "data.input=https://x.org/a.h5ad"], ["simulate", "https://x.org/a.h5ad"]),
        (["faults.kill_at_step=99", "train.max_steps=16"], ["faults.kill_at_step = 99", "16"]),
        (["faults.kill_at_step=1", "faults.rank=3"], ["faults.rank = 3", "ranks are 0 to 0"]),
        (["data.embed_file=e.h5ad"], ["data.embed_file = ", "model.embed_key"]),
        (
            ["model.embed_key=X", "model.output_space=embedding", "evaluate.folds=3"],
            ["predicts none", "'hvg' or 'all'"],
        ),
        (["model.embed_key=X", "loss.decoder_weight=0"], ["model.embed_key is never trained"]),
        (["data.hvg_flavor=vst"], ["data.hvg_flavor = 'vst'", "seurat_v3"]),
        (["data.hvg_batch_key="], ["data.hvg_batch_key", "empty"]),
        (["simulate.preset=vccc"], ["simulate: preset = 'vccc' must be one of: vcc"]),
        (["simulate.preset=true"], ["simulate.preset", "must not be true or false"]),
        (["simulate.preset=vcc", "simulate.depth=0"], ["simulate.depth = 0", "greater than 0"]),
        (["simulate.num_cells=9"], ["key 'simulate.num_genes' is required"]),
        (["data.genes=all"], ["data.genes = 'all'", "intersection"]),
        (["train.max_steps=99999999999"], ["train.max_steps = 99999999999", "2147483648"]),
        (["train.checkpoint_mirror=s3:/x"], ["train.checkpoint_mirror = 's3:/x'", "://"]),
        (["train.lrr=1"], ["unknown key 'train.lrr'", "Did you mean 'train.lr'"]),
        (["mode.hidden_dim=3"], ["unknown key 'mode'", "Did you mean 'model'"]),
        (["train.lr=fast"], ["train.lr = 'fast'", "number"]),
        (["train.lr=-1"], ["train.lr = -1", "greater than 0"]),
        (["model.num_heads=5"], ["num_heads = 5 does not divide hidden_dim = 768"]),
        (["split.train=0.9", "split.val=0.2"], ["train + val = 1.1", "below 1"]),
        (["split.folds=1"], ["split.folds = 1", "greater than or equal to 2"]),
        (["split.folds=5", "split.fold=5"], ["fold = 5", "0 to 4"]),
        (["split.fold=2"], ["fold = 2", "only meaningful with folds"]),
        (
            ["split.folds=5", "split.test_contexts=['k562']"],
            ["folds and test_contexts", "keep one"],
        ),
        (["split.file=a.toml", "split.folds=5"], ["file and folds", "keep one"]),
        (["split.val_contexts=['k562']"], ["val_contexts needs test_contexts"]),
        (["data.short_sets=pad"], ["data.short_sets = 'pad'", "'mask' or 'resample'"]),
        (["evaluate.baselines=['ridge']"], ["cell_mean"]),
        (["evaluate.baselines=['forest']"], ["forest", "ridge"]),
        (["data.input=${NOT_SET_ANYWHERE}/x"], ["NOT_SET_ANYWHERE", "not set", "export"]),
        (["nonsense"], ["'nonsense' is not of the form key.sub=value"]),
        (["name.sub=1"], ["'name' is a value, not a table"]),
        (["name=a/b"], ["name = 'a/b'"]),
    ],
)
def test_a_wrong_value_gives_one_clear_message(recipe: Path, overrides: list[str], parts):
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, overrides)
    for part in parts:
        assert part in str(caught.value)


def test_a_preset_fills_in_what_is_not_given(recipe: Path, tmp_path: Path):
    overrides = ["simulate.preset=vcc", "simulate.num_cells=5000", "simulate.gene_names=g.csv"]
    config = load_config(recipe, overrides)
    simulate = config.simulate
    assert simulate is not None
    assert (simulate.num_cells, simulate.num_genes, simulate.num_batches) == (5000, 18_080, 48)
    assert (simulate.calibration, simulate.count_type) == ("vcc", "uint16")
    assert simulate.gene_names == Path.cwd() / "g.csv"
    whole = load_config(recipe, ["simulate.preset=vcc"]).simulate
    assert whole is not None
    assert round(whole.num_cells * whole.control_fraction) == 38_176
    # Resolved, so that a later preset of this name changes no finished run.
    text = dump_config(config)
    assert "num_genes = 18080" in text
    (tmp_path / "config.toml").write_text(text)
    assert load_resolved_config(tmp_path / "config.toml") == config


def test_a_missing_recipe_names_the_nearest_file(recipe: Path):
    with pytest.raises(ConfigError, match=r"recipe\.toml"):
        load_config(recipe.with_name("recip.toml"))


def test_a_missing_required_key_is_named(tmp_path: Path):
    path = tmp_path / "r.toml"
    path.write_text('name = "r"\noutput_dir = "o"\n')
    with pytest.raises(ConfigError, match="key 'data' is required"):
        load_config(path)


def test_broken_toml_and_circles_are_refused(tmp_path: Path):
    path = tmp_path / "r.toml"
    path.write_text("name = \n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(path)
    path.write_text('include = ["r.toml"]\n')
    with pytest.raises(ConfigError, match="includes itself"):
        load_config(path)


def test_a_model_on_an_embedding_has_a_row_of_its_own(recipe: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = load_config(recipe)
    assert (plain.model.row_name, plain.model.cell_space, plain.model.has_decoder) == (
        *("state", "hvg", False),
    )
    keys = ["model.embed_key=X_state", "data.embed_file=e.h5ad", "evaluate.beside=['runs/a']"]
    config = load_config(recipe, [*keys, "model.output_space=all"])
    assert (config.model.row_name, config.model.cell_space) == ("state_X_state", "embedding")
    assert config.model.has_decoder
    assert config.is_judged
    assert config.data.embed_file == tmp_path / "e.h5ad"
    assert config.evaluate.beside == (tmp_path / "runs/a",)
    (tmp_path / "config.toml").write_text(dump_config(config))
    assert load_resolved_config(tmp_path / "config.toml") == config
    alone = load_config(recipe, ["model.embed_key=X", "model.output_space=embedding"])
    assert not alone.model.has_decoder
    assert not alone.is_judged
    url = load_config(recipe, [*keys, "data.embed_file=https://x.org/e.h5ad"])
    assert url.data.embed_file == "https://x.org/e.h5ad"


def test_differences_are_listed_by_key(recipe: Path):
    before, after = load_config(recipe), load_config(recipe, ["train.lr=0.5", "seed=1"])
    assert describe_differences(after, before) == ["seed: 42 -> 1", "train.lr: 0.0001 -> 0.5"]


@pytest.mark.parametrize("name", ["demo", "demo_state", "papalexi2021", "vcc"])
def test_shipped_recipes_are_valid(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STATEWIDE_DATA", "/data")
    config = load_config(REPO_ROOT / "configs" / f"{name}.toml")
    assert config.train.deepspeed.is_file()
