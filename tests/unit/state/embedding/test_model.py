"""The model of SE: shapes, masks, the order of genes, and that all of it is trained."""

import numpy as np
import pytest
import torch

from state.embed_config import EmbedLossConfig, EmbedModelConfig
from state.embedding.batch import TokenBatch
from state.embedding.heads import CountDecoder
from state.embedding.objective import EmbeddingObjective
from state.embedding.tokens import ExpressionBins
from tests.support.embedding import as_tensors, tiny_batch, tiny_model

NORMS = ["pre", "post"]


def embed(model, batch: TokenBatch) -> torch.Tensor:
    gene_BL, share_BL, mask_BT, *_ = as_tensors(batch)
    with torch.no_grad():
        return model.eval()(model.encode_genes(), gene_BL, share_BL, mask_BT).joined()


def test_the_embedding_has_682_numbers():
    model = tiny_model(output_dim=EmbedModelConfig().output_dim)
    embedding = embed(model, tiny_batch())
    assert embedding.shape == (6, 682)
    assert embedding.dtype == torch.float32
    np.testing.assert_allclose(embedding[:, :672].norm(dim=1), 1, rtol=1e-5)
    assert torch.isfinite(embedding).all()


@pytest.mark.parametrize("norm", NORMS)
def test_padding_never_changes_an_embedding(norm: str):
    """Cells with 0, 1 and more genes, beside longer ones, alone, and with rubbish as padding."""
    model, batch = tiny_model(norm=norm), tiny_batch()
    together = embed(model, batch)
    lengths = batch.mask_BT.sum(1) - 2
    assert lengths[0] == 0
    assert lengths[1] == 1
    rng = np.random.default_rng(0)
    for cell, length in enumerate(lengths):
        genes, shares = (x[cell : cell + 1, :length] for x in (batch.gene_BL, batch.share_BL))
        alone = batch._replace(
            gene_BL=genes, share_BL=shares, mask_BT=np.ones((1, length + 2), dtype=bool)
        )
        torch.testing.assert_close(embed(model, alone)[0], together[cell], rtol=1e-4, atol=1e-6)
        padded = batch._replace(
            gene_BL=np.hstack([genes, rng.integers(0, 30, (1, 9))]).astype(np.int32),
            share_BL=np.hstack([shares, rng.random((1, 9))]).astype(np.float32),
            mask_BT=np.array([[True] * (1 + length) + [False] * 9 + [True]]),
        )
        torch.testing.assert_close(embed(model, padded)[0], together[cell], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_the_order_of_genes_does_not_matter_but_their_expression_does(norm: str):
    model, batch = tiny_model(norm=norm), tiny_batch()
    cell = int(batch.mask_BT.sum(1).argmax())
    rows = [x[cell : cell + 1] for x in batch[:2]]
    mask = np.ones((1, rows[0].shape[1] + 2), dtype=bool)
    one = embed(model, batch._replace(gene_BL=rows[0], share_BL=rows[1], mask_BT=mask))
    back = [np.ascontiguousarray(row[:, ::-1]) for row in rows]
    two = embed(model, batch._replace(gene_BL=back[0], share_BL=back[1], mask_BT=mask))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    other = embed(model, batch._replace(gene_BL=rows[0], share_BL=back[1], mask_BT=mask))
    assert (one - other).abs().max() > 1e-4


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("num_datasets", [1, 3])
def test_a_gradient_reaches_every_parameter(norm: str, num_datasets: int):
    model = tiny_model(norm=norm, num_datasets=num_datasets)
    EmbeddingObjective(model, EmbedLossConfig(), num_shared=5)(
        *as_tensors(tiny_batch())
    ).loss.backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []


# Absent: sequence_len, which is the reader's (test_sequence).
CHANGES = {
    "hidden_dim": 8,
    "num_layers": 1,
    "num_heads": 4,
    "ffn_dim": 8,
    "output_dim": 5,
    "dataset_dim": 4,
    "num_bins": 3,
    "bin_hidden_dim": 4,
    "norm": "post",
    "dropout": 0.5,
    "decode_from_mean": False,
}


@pytest.mark.parametrize("key", sorted(EmbedModelConfig.model_fields.keys() - {"sequence_len"}))
def test_every_key_changes_the_model(key: str):
    def loss(model):
        torch.manual_seed(0)
        objective = EmbeddingObjective(model.train(), EmbedLossConfig(), num_shared=5)
        return objective(*as_tensors(tiny_batch())).loss.item()

    assert loss(tiny_model(**{key: CHANGES[key]})) != loss(tiny_model())


def test_soft_binning_is_its_plain_definition():
    torch.manual_seed(0)
    bins = ExpressionBins(num_bins=10, bin_hidden_dim=16, hidden_dim=6)
    shares = torch.tensor([0.0, 0.3, 7.5])
    for share, embedded in zip(shares, bins(shares), strict=True):
        hidden = bins.hidden.weight[:, 0] * share + bins.hidden.bias
        hidden = torch.where(hidden > 0, hidden, 0.01 * hidden)
        logits = bins.logits.weight @ hidden + bins.logits.bias
        weights = torch.exp(logits) / torch.exp(logits).sum()
        expected = sum(w * row for w, row in zip(weights, bins.bins_CD, strict=True))
        torch.testing.assert_close(embedded, expected)


def test_the_decoder_is_its_plain_definition():
    """The first layer is taken apart into genes and cells; together it is one Linear."""
    torch.manual_seed(0)
    decoder = CountDecoder(gene_dim=6, output_dim=4, dataset_dim=2)
    genes_VD, cell_BO, ds_BR = torch.randn(9, 6), torch.randn(3, 4), torch.randn(3, 2)
    depth_B, asked_BK = torch.rand(3), torch.randint(0, 9, (3, 5))
    decoded = decoder(genes_VD, asked_BK, cell_BO, depth_B, ds_BR)
    for cell in range(3):
        for place in range(5):
            gene = genes_VD[asked_BK[cell, place]]
            x = torch.cat([gene, cell_BO[cell], depth_B[cell, None], ds_BR[cell]])
            expected = decoder.out(decoder.second(decoder.first(x)))[0]
            torch.testing.assert_close(decoded[cell, place], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_recomputed_activations_give_the_same_gradients(norm: str):
    def gradients(*, recompute: bool):
        model = tiny_model(norm=norm)
        model.backbone.recompute_activations = recompute
        EmbeddingObjective(model, EmbedLossConfig(), num_shared=5)(
            *as_tensors(tiny_batch())
        ).loss.backward()
        return [p.grad for p in model.parameters()]

    for one, two in zip(gradients(recompute=False), gradients(recompute=True), strict=True):
        torch.testing.assert_close(one, two)
