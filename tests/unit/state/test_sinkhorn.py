"""The Sinkhorn divergence: against a small solver written out here, masks, and without geomloss."""

import builtins
import importlib.util

import pytest
import torch

from state.mmd.sinkhorn import sinkhorn_divergence
from tests.support.mmd_cases import normal

needs_geomloss = pytest.mark.skipif(
    importlib.util.find_spec("geomloss") is None,
    reason="geomloss is not installed (pip install 'statewide[sinkhorn]')",
)
BLUR = 0.5


def transport_cost(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The dual value of entropic transport between uniform clouds, after many plain iterations."""
    cost, epsilon = torch.cdist(x, y).square() / 2, BLUR**2
    f, g = torch.zeros(len(x)).double(), torch.zeros(len(y)).double()
    for _ in range(3000):
        f = -epsilon * ((g - cost) / epsilon).logsumexp(1) + epsilon * torch.tensor(len(y)).log()
        g = -epsilon * ((f[:, None] - cost) / epsilon).logsumexp(0)
        g = g + epsilon * torch.tensor(len(x)).log()
    return f.mean() + g.mean()


@needs_geomloss
def test_agrees_with_plain_iterations_and_ignores_empty_slots():
    x, y = normal(2, 5, 3) + 1, normal(2, 4, 3, seed=1)
    x_mask = torch.tensor([[True] * 5, [True, False, True, True, False]])
    x = x.where(x_mask[..., None], torch.nan).requires_grad_()
    loss = sinkhorn_divergence(x, y, x_mask, blur=BLUR)
    loss.sum().backward()
    assert not x.grad[~x_mask].any()
    assert x.grad[x_mask].isfinite().all()
    for b in range(2):
        u, v = x.detach()[b, x_mask[b]].double(), y[b].double()
        between, within_u, within_v = (transport_cost(*p) for p in ((u, v), (u, u), (v, v)))
        expected = between - within_u / 2 - within_v / 2
        assert loss[b].item() == pytest.approx(expected.item(), rel=0.1)  # geomloss stops early


@needs_geomloss
def test_stays_in_float32_under_autocast():
    x, y = normal(1, 5, 3) + 30, normal(1, 4, 3, seed=1) + 30
    expected = sinkhorn_divergence(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sinkhorn_divergence(x, y), expected)
    assert sinkhorn_divergence(x.bfloat16(), y).dtype == torch.float32


def test_without_geomloss_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    real_import = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "geomloss":
            raise ModuleNotFoundError("No module named 'geomloss'", name="geomloss")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    cells = torch.zeros(1, 2, 3)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'statewide\[sinkhorn\]'"):
        sinkhorn_divergence(cells, cells)
