"""The fused MMD on a GPU: the checks that the interpreter runs too, and what only a GPU has."""

import pytest
import torch

from benchmarks.mmd import CDIST_EXACT, cdist_loss
from state.mmd.dispatch import mmd_loss
from state.mmd.fused_triton import why_unavailable
from tests.support.fused_checks import CHECKS, FLOOR, SPLIT_FLOOR, fused, truth_of
from tests.support.mmd_cases import loss_and_gradients, normal, relative_errors

DEVICE = torch.device("cuda")
REASON = "no CUDA device" if not torch.cuda.is_available() else why_unavailable(DEVICE)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


@pytest.mark.parametrize("name", CHECKS)
def test_on_the_gpu(name):
    CHECKS[name](DEVICE)


def test_auto_takes_the_fused_kernels():
    x, y = normal(2, 130, 40).cuda(), normal(2, 130, 40, seed=1).cuda()
    assert torch.equal(mmd_loss(x, y), fused(x, y))


@pytest.mark.parametrize("split", [False, True])
def test_tensor_cores_keep_the_digits_of_float32_at_training_shapes(split):
    x, y = normal(2, 512, 2000).cuda() + 5.1, normal(2, 512, 2000, seed=1).cuda() + 5
    if split:
        y = y.bfloat16()
    grad = torch.tensor([0.7, -3.0]).cuda()
    truth = loss_and_gradients(
        lambda x, y: cdist_loss(x, y, CDIST_EXACT), x.double(), y.double(), grad
    )
    errors = relative_errors(loss_and_gradients(fused, x, y, grad)[:2], truth[:2])
    assert max(errors) < (SPLIT_FLOOR if split else FLOOR), errors


def test_the_host_does_not_wait_for_the_device():
    x, y = normal(2, 130, 40).cuda().requires_grad_(), normal(2, 130, 40, seed=1).cuda()
    mask = torch.ones(2, 130, dtype=torch.bool).cuda()
    fused(x, y, mask, mask).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused(x, y, mask, mask).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_set_without_cells_gives_nan_and_leaves_the_others_alone():
    x, y = normal(2, 9, 5).cuda(), normal(2, 9, 5, seed=1).cuda()
    mask = torch.ones(2, 9, dtype=torch.bool).cuda()
    mask[1] = False
    loss = fused(x, y, mask)
    assert loss[1].isnan()
    truth = truth_of(x, y, torch.ones(2).cuda())[0]
    torch.testing.assert_close(loss[0].double(), truth[0], rtol=1e-5, atol=0)


def test_memory_has_no_term_of_cells_by_cells_by_genes():
    num_sets, num_cells, num_genes = 2, 512, 4096
    x = normal(num_sets, num_cells, num_genes).cuda().requires_grad_()
    y = normal(num_sets, num_cells, num_genes, seed=1).cuda()
    fused(x, y).sum().backward()
    x.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fused(x, y).sum().backward()
    points, gradient = 2 * x.numel() * 4, x.numel() * 4
    weights = num_sets * num_cells * 2 * num_cells * 4
    assert torch.cuda.max_memory_allocated() - before < 1.1 * (points + gradient + weights)
