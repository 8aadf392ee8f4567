"""Weights exported as safetensors: those of the checkpoint, bit for bit, and refusals."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from launcher.errors import LaunchError
from launcher.export import export_weights
from state.config import ConfigError, RunConfig
from state.recipe import dump_config, load_config, load_embed_config
from state.training.checkpoint import CheckpointFolder
from state.training.checkpoint_files import Progress
from state.transition.initialize import initialize_from
from state.transition.model import build_transition_model
from tests.support.embed_runs import write_embed_recipe
from tests.support.runs import write_recipe
from tests.unit.state.training.test_background import Alone


def build(config: RunConfig, seed: int):
    torch.manual_seed(seed)
    return build_transition_model(config.model, num_genes=20, pert_dim=8, num_batches=1)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Return what a run of ST leaves, as far as an export asks for it: the second step is best."""
    config = load_config(write_recipe(tmp_path), [f"output_dir={tmp_path / 'run'}"])
    config.output_dir.mkdir()
    (config.output_dir / "config.toml").write_text(dump_config(config))
    checkpoints = CheckpointFolder(config.output_dir / "checkpoints", "any", keep_last=3)
    for step, val_loss in ((1, 0.9), (2, 0.1), (3, 0.5)):
        engine = Alone()
        weights = build(config, seed=step).state_dict()
        engine.weights = {f"model.{name}": value for name, value in weights.items()}
        engine.save = lambda folder: None
        checkpoints.save(engine, Progress(step=step, sets_consumed=step, val_loss=val_loss))
    return config.output_dir


@pytest.mark.parametrize(
    ("which", "step"), [("best", 2), ("last", 3), ("step_00000001", 1), ("step_00000002", 2)]
)
def test_the_weights_are_those_of_the_checkpoint(run_dir: Path, tmp_path: Path, which, step):
    out = tmp_path / "model.safetensors"
    said = export_weights(run_dir, out, which)
    expected = torch.load(run_dir / f"checkpoints/step_{step:08d}/model.pt")
    exported = load_file(out)
    assert {f"model.{name}" for name in exported} == set(expected)
    for name, value in exported.items():
        assert value.dtype == expected[f"model.{name}"].dtype
        assert torch.equal(value, expected[f"model.{name}"])
    assert f"of step_{step:08d}" in said
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert metadata["statewide.kind"] == "ST"
    assert json.loads(metadata["statewide.progress"])["step"] == step
    assert metadata["statewide.recipe"] == (run_dir / "config.toml").read_text()
    assert said.endswith("; without gene names: the run's store is not there")
    assert "statewide.genes" not in metadata


def test_an_exported_model_starts_another_one(run_dir: Path, tmp_path: Path):
    out = tmp_path / "model.safetensors"
    export_weights(run_dir, out, "best")
    config = load_config(write_recipe(tmp_path), [])
    model = build(config, seed=7)
    report = initialize_from(model, out)
    assert not report.fresh
    for name, value in build(config, seed=2).state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    out.write_bytes(b"no such thing")
    with pytest.raises(ConfigError, match="cannot be read as a safetensors file"):
        initialize_from(model, out)


def test_a_run_of_se_is_exported_as_such(tmp_path: Path):
    run_dir = tmp_path / "se"
    config = load_embed_config(write_embed_recipe(tmp_path), [f"output_dir={run_dir}"])
    run_dir.mkdir()
    (run_dir / "config.toml").write_text(dump_config(config))
    engine = Alone()
    engine.weights = {"model.cls_D": torch.arange(3.0)}
    engine.save = lambda folder: None
    CheckpointFolder(run_dir / "checkpoints", "any").save(engine, Progress(step=1))
    out = tmp_path / "se.safetensors"
    export_weights(run_dir, out, "best")
    assert load_file(out)["cls_D"].tolist() == [0, 1, 2]
    with safe_open(out, "pt") as file:
        assert file.metadata()["statewide.kind"] == "SE"


def test_what_cannot_be_exported_is_said_and_nothing_is_written(run_dir: Path, tmp_path: Path):
    out = tmp_path / "model.safetensors"
    save_file({"old": torch.zeros(1)}, out)
    before = out.read_bytes()
    with pytest.raises(LaunchError, match=r"'newest' must be best, last, or one of step_00000001"):
        export_weights(run_dir, out, "newest")
    with pytest.raises(LaunchError, match=r"'model\.pt' must end in \.safetensors"):
        export_weights(run_dir, Path("model.pt"), "best")
    with pytest.raises(LaunchError, match="is not a run folder"):
        export_weights(tmp_path / "absent", out, "best")
    (run_dir / "checkpoints/step_00000002/model.pt").write_bytes(b"")
    with pytest.raises(LaunchError, match=r"damaged \(model\.pt\).*: step_00000001, step_00000003"):
        export_weights(run_dir, out, "best")
    assert out.read_bytes() == before
    repeats = tmp_path / "repeats"
    (repeats / "runs" / "fold0").mkdir(parents=True)
    (repeats / "config.toml").write_text((run_dir / "config.toml").read_text())
    with pytest.raises(LaunchError, match=r"no complete checkpoint\. Name one of .*fold0"):
        export_weights(repeats, out, "best")


def test_a_target_that_is_a_folder_or_among_the_checkpoints_is_refused(run_dir, tmp_path):
    folder = tmp_path / "dir.safetensors"
    folder.mkdir()
    with pytest.raises(LaunchError, match=r"is a folder. Name the file to write, such as .*/new"):
        export_weights(run_dir, folder, "best")
    inside = run_dir / "checkpoints" / "step_00000002" / "x.safetensors"
    with pytest.raises(LaunchError, match="lies among the run's checkpoints"):
        export_weights(run_dir, inside, "best")
    assert not inside.exists()
