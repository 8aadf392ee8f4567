"""DeepSpeed settings: what it would ignore in silence is an error here."""

import json
from pathlib import Path

import pytest

from launcher.deepspeed_config import complete_deepspeed_config, read_deepspeed_json
from launcher.errors import LaunchError
from state.config import TrainConfig

CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "deepspeed"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_shipped_files_name_their_stage(stage: int):
    content = read_deepspeed_json(CONFIGS / f"zero{stage}.json")
    assert content["zero_optimization"]["stage"] == stage


def test_batch_sizes_agree_and_clipping_is_explicit():
    settings = TrainConfig(micro_batch_size=3, grad_accum_steps=5, grad_clip=7)
    config = complete_deepspeed_config({"zero_optimization": {"stage": 2}}, settings, world_size=4)
    assert config["train_batch_size"] == 60
    assert config["train_micro_batch_size_per_gpu"] == 3
    assert config["gradient_accumulation_steps"] == 5
    assert config["gradient_clipping"] == 7
    # It would round the weights: the objective computes in bf16 by itself.
    assert "bf16" not in config


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"zero_optimisation": {"stage": 2}}, ["'zero_optimisation'", "'zero_optimization'"]),
        ({"train_batch_size": "auto"}, ["train_batch_size", "train.micro_batch_size"]),
        ({"gradient_clipping": 1.0}, ["train.grad_clip"]),
        ({"zero_optimization": {"stage": 4}}, ["stage = 4", "0, 1, 2 or 3"]),
        ([], ["one JSON object"]),
    ],
)
def test_what_deepspeed_would_ignore_is_refused(tmp_path: Path, content, parts):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    with pytest.raises(LaunchError) as caught:
        read_deepspeed_json(path)
    for part in (str(path), *parts):
        assert part in str(caught.value)


def test_missing_and_malformed_files_are_named(tmp_path: Path):
    with pytest.raises(LaunchError, match="does not exist"):
        read_deepspeed_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(LaunchError, match="not valid JSON"):
        read_deepspeed_json(tmp_path / "bad.json")
