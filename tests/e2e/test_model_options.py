"""A tiny run with many options at once, and one that starts from its weights."""

import gzip
import json
from pathlib import Path

import pytest

from tests.support.runs import read_records, statewide, write_recipe

pytestmark = pytest.mark.e2e

COMMON = (
    "--local",
    "statistics.enabled=false",
    "train.max_steps=6",
    "evaluate.baselines=['cell_mean']",
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with the reference's tokens, its residual for all genes, and a profile."""
    path = write_recipe(tmp_path_factory.mktemp("options"))
    finished = statewide(
        "run",
        path,
        *COMMON,
        "train.profile_steps=[2, 3]",
        "train.peak_tflops=0.3",
        "train.precision=bf16",
        "train.activation_checkpointing=true",
        "train.grad_accum_steps=2",
        "model.output_space=all",
        "model.residual=genes",
        "model.batch_token=true",
        "model.confidence_token=true",
        "loss.l1_to_control=0.1",
    )
    assert finished.returncode == 0, finished.stderr
    return path


def test_every_term_and_rate_is_recorded_and_the_steps_are_profiled(recipe: Path):
    run_dir = recipe.parent / "run"
    record = read_records(run_dir)[0]
    terms = ("loss", "mmd", "l1_to_control", "batch_token", "confidence")
    assert all(f"train/{name}" in record for name in terms)
    assert record["throughput/mfu_pct"] > 0
    with gzip.open(run_dir / "profile" / "trace.json.gz") as handle:
        assert json.load(handle)["traceEvents"]


def test_a_run_starts_from_the_weights_of_another(recipe: Path, tmp_path: Path):
    first = recipe.parent / "run"
    finished = statewide(
        "run",
        recipe,
        *COMMON,
        f"output_dir={tmp_path / 'second'}",
        f"model.init_from={first}",
        "model.lora_rank=2",
        "model.attention=identity",
        "train.freeze=['cell_encoder']",
        "loss.kind=mse",
    )
    assert finished.returncode == 0, finished.stderr
    report = json.loads((tmp_path / "second" / "init_from.json").read_text())
    assert "pert_encoder.0.weight" in report["taken"]
    assert any("shape" in why for why in report["fresh"].values())
    assert any(name.startswith("tokens.") for name in report["unused"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.embed_key=X_state", "has no obsm['X_state']"),
        ("model.init_from=/nowhere.pt", "model.init_from"),
        ("train.freeze=['tokens']", "no 'tokens'"),
    ],
)
def test_what_cannot_be_trained_is_one_message(recipe: Path, tmp_path: Path, override, message):
    finished = statewide("run", recipe, *COMMON, f"output_dir={tmp_path / 'x'}", override)
    assert finished.returncode == 2
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr
