"""The loss of SE against its plain definition, and what its settings do."""

import numpy as np
import pytest
import torch

from state.embed_config import EmbedLossConfig
from state.embedding import objective as objective_module
from state.embedding.objective import EmbeddingObjective
from tests.support.embedding import as_tensors, tiny_batch, tiny_model

SHARED = 5


def objective(num_datasets: int = 3, **settings) -> EmbeddingObjective:
    model = tiny_model(num_datasets=num_datasets).eval()
    return EmbeddingObjective(model, EmbedLossConfig(**settings), num_shared=SHARED)


@pytest.mark.parametrize("kind", ["l2", "mse"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_is_its_plain_definition(kind: str, weighted: bool):
    batch = tiny_batch()
    # A gene that one cell's dataset lacks, and one that no cell's has.
    batch.known_BK[2, -1] = False
    batch.known_BK[:, -2] = False
    ours = objective(kind=kind, shared_weight=0.5, dataset_weight=2.0)
    weight = np.array([1, 1, 0, 1, 1, 0], dtype=np.float32) if weighted else np.ones(6)
    given = (torch.from_numpy(weight),) if weighted else ()
    losses = ours(*as_tensors(batch), *given)

    gene, share, mask, depth, dataset, asked, target, known = as_tensors(batch)
    genes = ours.model.encode_genes()
    embedding = ours.model(genes, gene, share, mask)
    decoded = ours.model.decode(genes, asked, embedding, depth)
    error = ((decoded - target) ** 2).detach().numpy()
    power = 0.5 if kind == "l2" else 1.0
    counted = [cell for cell in range(6) if weight[cell]]
    cells = np.mean([error[c][known[c]].mean() ** power for c in counted])
    shared = []
    for place in range(error.shape[1] - SHARED, error.shape[1]):
        having = [c for c in counted if known[c, place]]
        if having:
            shared.append(error[having, place].mean() ** power)
    entropy = -embedding.logits_BC.log_softmax(1)[torch.arange(6), dataset]
    expected = [cells, np.mean(shared), entropy[counted].mean().item()]
    np.testing.assert_allclose(losses.terms_K, expected, rtol=1e-4)
    assert ours.term_names == ("cells", "shared_genes", "dataset")
    total = expected[0] + 0.5 * expected[1] + 2.0 * expected[2]
    assert losses.loss.item() == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("decode_from_mean", [False, True])
def test_a_batch_smaller_than_the_table_encodes_its_own_genes_alone(
    decode_from_mean: bool, monkeypatch: pytest.MonkeyPatch
):
    """With the same loss and the same gradients."""
    model = tiny_model(decode_from_mean=decode_from_mean)
    ours = EmbeddingObjective(model, EmbedLossConfig(), num_shared=SHARED)
    batch = as_tensors(type(tiny_batch())(*(array[2:3] for array in tiny_batch())))
    encoded, found = [], []
    model.gene_encoder.register_forward_hook(lambda *call: encoded.append(len(call[-1])))
    for _ in range(2):
        ours.zero_grad()
        losses = ours(*batch)
        losses.loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([losses.loss.detach(), *gradients])
        monkeypatch.setattr(
            objective_module, "find_used", lambda read, asked, _: (None, read, asked)
        )
    assert encoded[0] < encoded[1] == len(model.table_VE)
    assert len(found[0]) == len(found[1]) > 10
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_with_one_dataset_there_is_nothing_to_classify():
    assert objective(num_datasets=1).term_names == ("cells", "shared_genes")


def test_a_batch_that_does_not_count_has_loss_0():
    losses = objective()(*as_tensors(tiny_batch()), torch.zeros(6))
    assert losses.loss.item() == 0


def test_mean_squares_do_not_depend_on_the_division_of_cells():
    """Two halves, averaged, are the whole: what makes two workers equal to one."""
    ours = objective(kind="mse")
    tensors = as_tensors(tiny_batch(8))
    whole = ours(*tensors).loss
    halves = [ours(*(t[part] for t in tensors)).loss for part in (slice(4), slice(4, 8))]
    assert whole.item() == pytest.approx(sum(halves).item() / 2, rel=1e-5)


def test_bf16_keeps_the_loss_in_float32():
    ours = objective()
    exact = ours(*as_tensors(tiny_batch())).loss
    ours.use_bf16 = True
    rounded = ours(*as_tensors(tiny_batch())).loss
    assert rounded.dtype == torch.float32
    assert rounded.item() != exact.item()
    assert rounded.item() == pytest.approx(exact.item(), rel=0.05)


def test_a_few_steps_learn_which_genes_are_expressed():
    torch.manual_seed(0)
    ours = objective(num_datasets=1).train()
    optimizer = torch.optim.AdamW(ours.parameters(), lr=3e-3)
    tensors = as_tensors(tiny_batch(12))
    tensors = (*tensors[:4], torch.zeros_like(tensors[4]), *tensors[5:])
    first = ours(*tensors).loss.item()
    for _ in range(60):
        optimizer.zero_grad()
        loss = ours(*tensors).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first
