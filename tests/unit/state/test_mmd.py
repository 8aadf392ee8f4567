"""The MMD against its definition in float64: values, every gradient, masks, and torch's tools."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from state.mmd import blocked
from state.mmd.blocked import mmd2_blocked
from state.mmd.dispatch import mmd_loss
from state.mmd.kernel_functions import KERNELS, compute_gamma
from state.mmd.reference import mmd2_reference
from tests.support.mmd_cases import (
    CASES,
    B,
    G,
    S,
    T,
    loss_and_gradients,
    normal,
    plain_gram,
    relative_errors,
    shifted,
    typical,
)


@pytest.mark.parametrize("case", CASES)
def test_blocked_is_at_least_as_exact_as_a_plain_gram(case):
    squared_errors = {"ours": torch.zeros(3), "plain": torch.zeros(3)}
    num_seeds = 6
    for seed in range(num_seeds):
        x, y = CASES[case](seed)
        grad = torch.tensor([0.7, -3.0])[: len(x)]
        truth = loss_and_gradients(mmd2_reference, x.double(), y.double(), grad)
        for name, function in (("ours", mmd2_blocked), ("plain", plain_gram)):
            errors = relative_errors(loss_and_gradients(function, x, y, grad), truth)
            squared_errors[name] += torch.tensor(errors).square() / num_seeds
    ours, plain = squared_errors["ours"].sqrt(), squared_errors["plain"].sqrt()
    # Sets that nearly coincide are at the limit of float32 for both; the rest is luck.
    assert (ours <= 1.25 * plain + 1e-6).all(), (ours, plain)


@pytest.mark.parametrize("case", ["typical", "far_apart", "shifted", "several_tiles"])
def test_blocked_is_exact_to_rounding_wherever_the_sets_lie(case):
    x, y = CASES[case]()
    grad = torch.ones(len(x))
    truth = loss_and_gradients(mmd2_reference, x.double(), y.double(), grad)
    ours = relative_errors(loss_and_gradients(mmd2_blocked, x, y, grad), truth)
    assert max(ours) < 2e-6, ours


@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_masked_slots_contribute_nothing_whatever_they_hold(impl):
    x, y = typical()
    x_mask = torch.rand(B, S, generator=torch.Generator().manual_seed(2)) > 0.4
    y_mask = torch.rand(B, T, generator=torch.Generator().manual_seed(3)) > 0.4
    x_mask[1], y_mask[0] = True, True
    x, y = x.where(x_mask[..., None], torch.nan), y.where(y_mask[..., None], 1e9)
    grad = torch.tensor([2.0, -0.5])

    def function(x: Tensor, y: Tensor, *masks: Tensor) -> Tensor:
        return mmd_loss(x, y, *masks, impl=impl)

    loss, grad_x, grad_y = loss_and_gradients(function, x, y, grad, x_mask, y_mask)
    assert not grad_x[~x_mask].any()
    assert not grad_y[~y_mask].any()
    for b in range(B):
        real_x, real_y = x[b, x_mask[b]][None].double(), y[b, y_mask[b]][None].double()
        truth = loss_and_gradients(mmd2_reference, real_x, real_y, grad[b : b + 1])
        ours = (loss[b : b + 1], grad_x[b, x_mask[b]][None], grad_y[b, y_mask[b]][None])
        assert max(relative_errors(ours, truth)) < 5e-6


@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_single_cells(impl):
    x, y = normal(3, 1, 5), normal(3, 1, 5, seed=1)
    x.requires_grad_()
    loss = mmd_loss(x, y, impl=impl)
    torch.testing.assert_close(loss, 2 * (x - y).norm(dim=-1)[:, 0])
    loss.sum().backward()
    torch.testing.assert_close(x.grad, (2 * (x - y) / (x - y).norm(dim=-1, keepdim=True)).detach())


@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_identical_sets_have_no_loss_and_no_gradient(impl):
    y = normal(B, T, G)
    loss, grad_x, grad_y = loss_and_gradients(
        lambda x, y: mmd_loss(x, y, impl=impl), y, y, torch.ones(B)
    )
    assert loss.abs().max() < 1e-5
    assert max(grad_x.abs().max(), grad_y.abs().max()) < 1e-6


@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_cells_that_all_coincide_give_zero_gradient_and_no_nan(impl):
    cells = torch.full((1, 4, 6), 3.5)
    loss, grad_x, _ = loss_and_gradients(
        lambda x, y: mmd_loss(x, y, impl=impl), cells, cells[:, :3], torch.ones(1)
    )
    assert loss.item() == 0
    assert not grad_x.any()


def test_reference_agrees_with_a_sum_over_pairs():
    x, y = normal(1, 4, 3).double(), normal(1, 3, 3, seed=1).double()

    def mean_norm(u: Tensor, v: Tensor) -> float:
        return float(np.mean([np.linalg.norm(a - b) for a in u[0].numpy() for b in v[0].numpy()]))

    expected = 2 * mean_norm(x, y) - mean_norm(x, x) - mean_norm(y, y)
    assert mmd2_reference(x, y).item() == pytest.approx(expected, rel=1e-12)


def test_reference_passes_gradcheck_in_float64():
    x = normal(2, 4, 3).double().requires_grad_()
    y = normal(2, 3, 3, seed=1).double().requires_grad_()
    mask = torch.tensor([[True, True, False, True], [True, True, True, True]])
    assert torch.autograd.gradcheck(lambda x, y: mmd2_reference(x, y, mask), (x, y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_cells_are_computed_in_float32(dtype):
    x, y = (cells.to(dtype) for cells in shifted())
    grad = torch.tensor([0.7, -3.0])
    truth = loss_and_gradients(mmd2_reference, x.double(), y.double(), grad)
    loss, grad_x, grad_y = loss_and_gradients(mmd_loss, x, y, grad)
    assert (loss.dtype, grad_x.dtype, grad_y.dtype) == (torch.float32, dtype, dtype)
    errors = relative_errors((loss, grad_x, grad_y), truth)
    assert errors[0] < 2e-6
    # A gradient is rounded once, on its way out.
    assert max(errors[1:]) < 0.6 * torch.finfo(dtype).eps


def test_half_precision_prediction_against_float32_truth():
    x, y = typical()
    mixed = mmd_loss(x.bfloat16(), y)
    torch.testing.assert_close(mixed, mmd_loss(x.bfloat16().float(), y))


def test_autocast_leaves_the_loss_in_float32():
    x, y = shifted()
    grad = torch.ones(B)
    expected = loss_and_gradients(mmd2_blocked, x, y, grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = loss_and_gradients(mmd2_blocked, x, y, grad)
    for ours, theirs in zip(result, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kernel", KERNELS)
def test_opcheck(kernel):
    x, y = normal(2, 6, 5).requires_grad_(), normal(2, 4, 5, seed=1).requires_grad_()
    gamma = torch.tensor([0.1, 0.2])
    mask = torch.tensor([[True] * 6, [True, False] * 3])
    torch.library.opcheck(blocked._mmd2, (x, y, gamma, None, None, kernel, True))
    torch.library.opcheck(blocked._mmd2, (x, y, gamma, mask, mask[:, :4], kernel, True))
    torch.library.opcheck(blocked._mmd2, (x.detach(), y.detach(), gamma, None, None, kernel, False))
    _, a = blocked._mmd2(x.detach(), y.detach(), gamma, mask, None, kernel, True)
    torch.library.opcheck(
        blocked._mmd2_grad,
        (torch.ones(2), a, x.detach(), y.detach(), mask, None),
    )


def test_compiles_as_one_graph():
    x, y = typical()
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[0, 5:] = False

    def loss(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        return (mmd_loss(2 * x, y, mask) * torch.tensor([1.0, 2.0])).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected = loss_and_gradients(loss, x, y, torch.tensor(1.0), mask)
    result = loss_and_gradients(compiled, x, y, torch.tensor(1.0), mask)
    for ours, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kernel", ["rbf", "gaussian_mix"])
@pytest.mark.parametrize("case", ["typical", "duplicates", "shifted", "several_tiles"])
def test_gaussian_kernels_of_blocked_against_their_definition(case, kernel):
    x, y = CASES[case]()
    grad, gamma = torch.tensor([0.7, -3.0])[: len(x)], compute_gamma(y, None, None)

    def definition(x: Tensor, y: Tensor) -> Tensor:
        return mmd2_reference(x, y, kernel=kernel, gamma_B=gamma)

    def ours(x: Tensor, y: Tensor) -> Tensor:
        return mmd2_blocked(x, y, kernel=kernel, gamma_B=gamma)

    truth = loss_and_gradients(definition, x.double(), y.double(), grad)
    assert max(relative_errors(loss_and_gradients(ours, x, y, grad), truth)) < 5e-6


@pytest.mark.parametrize("kernel", ["rbf", "gaussian_mix"])
def test_the_definition_of_the_gaussian_kernels(kernel):
    x, y = normal(1, 4, 3).double(), normal(1, 3, 3, seed=1).double()
    widths = (
        [1.5] if kernel == "rbf" else [1.5 * factor for factor in (2, 2**0.5, 1, 0.5**0.5, 0.5)]
    )

    def mean_kernel(u: Tensor, v: Tensor) -> float:
        squared = np.square(u[0].numpy()[:, None] - v[0].numpy()[None]).sum(-1)
        return float(np.mean([np.exp(-squared / (2 * width**2)) for width in widths]))

    expected = mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)
    loss = mmd_loss(x, y, kernel=kernel, bandwidth=1.5)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_the_bandwidth_is_the_mean_squared_distance_of_the_true_cells():
    y = normal(2, 5, 3)
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]])
    y[1, 2] = torch.nan
    for b in range(2):
        cells = y[b, mask[b]].double()
        squared = torch.cdist(cells, cells).square().mean()
        assert compute_gamma(y, mask, None)[b].item() == pytest.approx(1 / (2 * squared.item()))
    assert compute_gamma(torch.ones(1, 4, 3), None, None).item() == 0.5


def test_gene_chunks_average_the_losses_of_their_genes():
    x, y = typical()
    expected = (mmd_loss(x[..., :136], y[..., :136]) + mmd_loss(x[..., 136:], y[..., 136:])) / 2
    torch.testing.assert_close(mmd_loss(x, y, num_gene_chunks=2), expected)


def test_without_a_gradient_no_weights_are_kept():
    x, y = typical()
    loss, weights = blocked._mmd2(x, y, None, None, None, "energy", False)
    assert weights.numel() == 0
    kept, _ = blocked._mmd2(x, y, None, None, None, "energy", True)
    assert torch.equal(loss, kept)
    with torch.no_grad():
        assert torch.equal(mmd_loss(x.requires_grad_(), y), loss)


def test_truth_without_gradient_costs_no_second_pass(monkeypatch):
    x, y = typical()
    calls = []
    centre_into = blocked._centre_into
    monkeypatch.setattr(blocked, "_centre_into", lambda *a: calls.append(0) or centre_into(*a))
    mmd_loss(x.requires_grad_(), y).sum().backward()
    assert len(calls) == 2 * B


def test_non_contiguous_cells():
    x, y = typical()
    turned = x.mT.contiguous().mT
    grad = torch.ones(B)
    expected = loss_and_gradients(mmd_loss, x, y, grad)
    for ours, theirs in zip(loss_and_gradients(mmd_loss, turned, y, grad), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_scale_and_auto():
    x, y = typical()
    torch.testing.assert_close(mmd_loss(x, y, scale=0.5), 0.5 * mmd_loss(x, y))
    assert mmd_loss(x, y).dtype == torch.float32
    exact = mmd_loss(x.double(), y)
    assert torch.equal(exact, mmd2_reference(x.double(), y.double()))


@settings(max_examples=30, deadline=None)
@given(
    num_cells=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    num_genes=st.integers(1, 12),
    seed=st.integers(0, 10_000),
)
def test_is_a_distance_that_ignores_order_and_position(num_cells, num_genes, seed):
    x = normal(1, num_cells[0], num_genes, seed=seed)
    y = normal(1, num_cells[1], num_genes, seed=seed + 1)
    loss = mmd_loss(x, y)
    assert loss.item() >= -1e-5
    order = torch.randperm(num_cells[0], generator=torch.Generator().manual_seed(seed))
    for same in (mmd_loss(x[:, order], y), mmd_loss(y, x), mmd_loss(x + 3, y + 3)):
        torch.testing.assert_close(same, loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mmd_loss(3 * x, 3 * y), 3 * loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_a_set_without_cells_is_refused(impl):
    x, y = typical()
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[1] = False
    with pytest.raises(ValueError, match=r"cell sets? \[?1\]? ha.* no cell"):
        mmd_loss(x, y, mask, impl=impl)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_BSG": torch.zeros(2, 3)}, "x_BSG has shape"),
        ({"x_BSG": torch.zeros(2, 0, 4)}, "x_BSG has shape"),
        ({"y_BTG": torch.zeros(2, 3, 4, dtype=torch.int64)}, "y_BTG is torch.int64"),
        ({"y_BTG": torch.zeros(2, 3, 5)}, "same number of sets"),
        ({"y_BTG": torch.zeros(1, 3, 4)}, "same number of sets"),
        ({"y_BTG": torch.zeros(2, 3, 4, device="meta")}, "x_BSG is on cpu and y_BTG on meta"),
        ({"x_mask_BS": torch.ones(2, 3)}, "x_mask_BS is torch.float32"),
        ({"y_mask_BT": torch.ones(2, 2, dtype=torch.bool)}, "y_mask_BT is torch.bool"),
        ({"impl": "fused"}, "'fused' is not one of 'auto', 'reference', 'blocked', 'triton'"),
        ({"impl": "triton"}, "impl 'triton' cannot run: "),
        ({"kernel": "laplace"}, "kernel = 'laplace' is not one of 'energy', 'rbf', 'gaussian_mix'"),
        ({"kernel": "rbf", "bandwidth": 0.0}, "bandwidth = 0.0: expected a positive number"),
        ({"num_gene_chunks": 5}, "num_gene_chunks = 5: expected 1 to the number of genes, 4"),
        ({"num_gene_chunks": 0}, "num_gene_chunks = 0: expected 1 to"),
        ({"x_BSG": torch.zeros(2, 3, 4).double(), "impl": "blocked"}, "use 'reference'"),
    ],
)
def test_input_that_does_not_fit_is_refused(change, message):
    arguments = {"x_BSG": torch.zeros(2, 3, 4), "y_BTG": torch.zeros(2, 3, 4)} | change
    with pytest.raises(ValueError, match=message):
        mmd_loss(**arguments)
