"""The objective that is trained, and prediction with it."""

import numpy as np
import pytest
import torch

from data_store.schema import CellBatch
from state.config import LossConfig
from state.losses import SetObjective
from state.mmd.dispatch import mmd_loss
from state.mmd.reference import mmd2_reference
from state.model_config import ModelConfig
from state.transition.model import build_transition_model
from state.transition.predict import predict_cells

S, G, NUM_PERTS, D = 6, 9, 4, 3


def build(dropout: float = 0.0, **loss) -> SetObjective:
    torch.manual_seed(0)
    config = ModelConfig(
        cell_set_len=S, hidden_dim=16, num_layers=1, num_heads=2, ffn_dim=32, dropout=dropout
    )
    model = build_transition_model(config, num_genes=G, pert_dim=D, num_batches=2)
    model.initialize_output(torch.ones(G))
    return SetObjective(model, torch.randn(NUM_PERTS, D), LossConfig(**loss))


def cell_batch(num_cells: tuple[int, ...] = (S, 2, 4), seed: int = 0) -> CellBatch:
    rng = np.random.default_rng(seed)
    mask = np.arange(S) < np.array(num_cells)[:, None]
    shape = (len(num_cells), S, G)
    return CellBatch(
        control_BSG=rng.random(shape, dtype=np.float32) * mask[..., None],
        target_BSG=rng.random(shape, dtype=np.float32) * mask[..., None],
        mask_BS=mask,
        pert_B=rng.integers(0, NUM_PERTS, len(num_cells)),
        context_B=np.zeros(len(num_cells), dtype=np.int64),
        batch_BS=rng.integers(0, 2, mask.shape) * mask,
    )


def tensors(batch: CellBatch) -> dict[str, torch.Tensor]:
    fields = ("control_BSG", "target_BSG", "mask_BS", "pert_B", "batch_BS")
    return {name: torch.from_numpy(getattr(batch, name)) for name in fields}


@pytest.mark.parametrize("impl", ["auto", "reference", "blocked"])
def test_loss_is_the_mean_mmd_of_the_real_cells(impl):
    objective, batch = build(mmd_impl=impl, scale=0.5), tensors(cell_batch())
    result = objective(**batch)
    predicted = objective.predict(
        batch["control_BSG"], batch["mask_BS"], batch["pert_B"], batch["batch_BS"]
    )
    for b, mask in enumerate(batch["mask_BS"]):
        expected = 0.5 * mmd2_reference(
            predicted[b : b + 1, mask], batch["target_BSG"][b : b + 1, mask]
        )
        torch.testing.assert_close(result.distance_B[b : b + 1], expected.detach())
    torch.testing.assert_close(result.loss, result.distance_B.mean())


@pytest.mark.parametrize(
    "change",
    [
        {"kernel": "rbf"},
        {"kernel": "gaussian_mix"},
        {"kernel": "rbf", "bandwidth": 0.3},
        {"num_gene_chunks": 3},
        {"scale": 2.0},
    ],
)
def test_every_option_of_the_loss_reaches_it(change):
    batch = tensors(cell_batch())
    mask = batch["mask_BS"]
    objective = build(**change)
    predicted = objective.predict(batch["control_BSG"], mask, batch["pert_B"], batch["batch_BS"])
    distance_B = objective(**batch).distance_B
    expected_B = mmd_loss(predicted, batch["target_BSG"], mask, mask, **change)
    torch.testing.assert_close(distance_B, expected_B.detach())
    assert not torch.allclose(distance_B, build()(**batch).distance_B)


def test_the_sinkhorn_divergence_is_a_loss():
    pytest.importorskip("geomloss", reason="geomloss is not installed")
    batch = tensors(cell_batch())
    objective = build(kind="sinkhorn", blur=0.5)
    result = objective(**batch)
    result.loss.backward()
    assert any(p.grad.any() for p in objective.parameters())
    assert not torch.allclose(
        result.distance_B, build(kind="sinkhorn", blur=2.0)(**batch).distance_B
    )
    torch.testing.assert_close(
        build(kind="sinkhorn", blur=0.5, scale=3.0)(**batch).distance_B, 3 * result.distance_B
    )


def test_weights_give_a_weighted_mean():
    objective, batch = build(), tensors(cell_batch())
    weight = torch.tensor([1.0, 0.0, 3.0])
    result = objective(**batch, weight_B=weight)
    expected = (result.distance_B[0] + 3 * result.distance_B[2]) / 4
    torch.testing.assert_close(result.loss, expected)
    nothing = objective(**batch, weight_B=torch.zeros(3)).loss
    nothing.backward()
    assert nothing.item() == 0
    assert not any(p.grad.any() for p in objective.parameters())


def test_each_set_is_given_its_own_perturbation():
    objective, batch = build(), tensors(cell_batch((S, S, S)))
    seen = []
    objective.model.pert_encoder.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    objective(**batch)
    assert torch.equal(seen[0], objective.features_PD[batch["pert_B"]])


def test_a_few_steps_lower_the_loss():
    objective, batch = build(), tensors(cell_batch())
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = objective(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_features_are_no_checkpoint_and_stay_float32_when_the_module_is_cast():
    objective = build()
    features = objective.features_PD.clone()
    assert not any("features" in name for name in objective.state_dict())
    objective.bfloat16()
    assert next(objective.parameters()).dtype == torch.bfloat16
    assert torch.equal(objective.features_PD, features)
    objective.to("meta")
    assert objective.features_PD.device.type == "meta"


def test_bfloat16_weights_give_a_float32_loss():
    objective, batch = build(), tensors(cell_batch())
    expected = objective(**batch).loss.item()
    result = objective.bfloat16()(**batch)
    assert result.loss.dtype == torch.float32
    assert result.loss.item() == pytest.approx(expected, rel=0.02)
    result.loss.backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in objective.parameters())


def test_predict_cells_yields_the_real_cells_in_order():
    objective = build(dropout=0.5)
    batches = [cell_batch(), cell_batch((1, 3), seed=1)]
    objective.eval()
    with torch.no_grad():
        expected = []
        for batch in map(tensors, batches):
            predicted = objective.predict(
                batch["control_BSG"], batch["mask_BS"], batch["pert_B"], batch["batch_BS"]
            )
            expected.append(predicted[batch["mask_BS"]].numpy())
    objective.train()
    result = list(predict_cells(objective, batches))
    assert [cells.shape for cells in result] == [(S + 2 + 4, G), (4, G)]
    assert all(cells.dtype == np.float32 for cells in result)
    for ours, theirs in zip(result, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_predict_cells_leaves_training_as_it_was():
    objective = build().train()
    predictions = predict_cells(objective, [cell_batch(), cell_batch()])
    next(predictions)
    assert objective.training
    assert not torch.is_inference_mode_enabled()
    objective(**tensors(cell_batch())).loss.backward()


def test_predict_cells_takes_read_only_arrays_and_bfloat16_weights():
    batch = cell_batch()
    for array in batch:
        array.setflags(write=False)
    (cells,) = predict_cells(build().bfloat16(), [batch])
    assert cells.dtype == np.float32
