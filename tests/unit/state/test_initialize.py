"""Starting from another checkpoint: what fits is taken, what does not is named."""

from pathlib import Path

import pytest
import torch

from state.config import ConfigError
from state.model_config import ModelConfig
from state.transition.initialize import find_weights, initialize_from
from state.transition.model import StateTransition, build_transition_model


def build(seed: int, *, num_genes: int = 9, **changes) -> StateTransition:
    torch.manual_seed(seed)
    settings = {"hidden_dim": 8, "num_layers": 1, "num_heads": 2, "ffn_dim": 16}
    return build_transition_model(
        ModelConfig(**(settings | changes)), num_genes=num_genes, pert_dim=4, num_batches=2
    )


def save(model: StateTransition, path: Path, prefix: str = "model.") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({prefix + name: value for name, value in model.state_dict().items()}, path)
    return path


def test_all_of_the_same_model_is_taken(tmp_path: Path):
    source, model = build(1), build(2)
    report = initialize_from(model, save(source, tmp_path / "model.pt"))
    assert set(report.taken) == set(model.state_dict())
    assert (report.fresh, report.unused) == ({}, {})
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_other_genes_keep_their_random_start_and_the_rest_is_taken(tmp_path: Path):
    source, model = build(1, num_genes=7), build(2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = initialize_from(model, save(source, tmp_path / "model.pt"))
    assert set(report.fresh) == {"cell_encoder.0.weight", "head.mlp.0.weight", "head.mlp.0.bias"}
    assert report.fresh["cell_encoder.0.weight"] == "shape [8, 9], in the file [8, 7]"
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (
            name in report.fresh or "norm" in name or name.endswith("encoder.0.bias")
        )


def test_lora_and_tokens_are_new_on_old_weights(tmp_path: Path):
    path = save(build(1), tmp_path / "model.pt")
    model = build(2, lora_rank=2, init_from=path, batch_token=True, batch_encoder=False)
    report = initialize_from(model, path)
    assert {name.split(".")[0] for name in report.fresh} == {"tokens", "backbone"}
    assert all("lora_" in name or "tokens" in name for name in report.fresh)
    assert report.unused == {"batch_encoder.weight": "there is no such tensor in this model"}


def test_a_run_folder_gives_its_newest_checkpoint(tmp_path: Path):
    for step in (5, 10):
        save(build(step), tmp_path / "checkpoints" / f"step_{step:08d}" / "model.pt")
    (tmp_path / "checkpoints" / "step_00000015.partial").mkdir()
    assert find_weights(tmp_path).parent.name == "step_00000010"
    with pytest.raises(ConfigError, match="neither a file nor the folder"):
        find_weights(tmp_path / "nothing")


def test_nothing_that_fits_is_an_error(tmp_path: Path):
    path = save(build(1, hidden_dim=12, num_genes=7), tmp_path / "model.pt")
    with pytest.raises(ConfigError, match=r"none of its \d+ tensors fits") as caught:
        initialize_from(build(2), path)
    assert "shape [8, 9], in the file [12, 7]" in str(caught.value)


def test_files_that_are_no_weights_are_refused(tmp_path: Path):
    path = tmp_path / "w.pt"
    path.write_text("not torch")
    with pytest.raises(ConfigError, match="init_from"):
        initialize_from(build(1), path)
    torch.save([1, 2], path)
    with pytest.raises(ConfigError, match="holds a list"):
        initialize_from(build(1), path)
    weights = build(1).state_dict()
    weights["head.mlp.0.bias"][0] = torch.nan
    torch.save(weights, path)
    with pytest.raises(ConfigError, match="NaN"):
        initialize_from(build(1), path)
