"""The fused MMD on a GPU beside geomloss and torch.cdist: time, peak memory and error.

``python -m benchmarks.mmd_gpu`` on a machine with a CUDA device, triton, and for its side
geomloss. Not part of ``make bench``. ``--tiles`` times every tile of ``state.mmd.fused_tiles`` too.
Written without a GPU at hand: it has not been run. Shape legend: B cell sets, S cells in a set, G
genes.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks.mmd import CDIST_DEFAULT, CDIST_EXACT, cdist_loss, draw_cells
from state.mmd import fused_tiles as tiles
from state.mmd.fused_triton import mmd2_fused, why_unavailable

SHAPES = ((8, 256, 2000), (16, 512, 2000), (4, 512, 18080), (16, 512, 18080))
Loss = Callable[[Tensor, Tensor], Tensor]


def main(arguments: list[str] | None = None) -> int:
    """Print a table; return 1 where there is no GPU, or ours errs more than geomloss."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mmd_gpu", description=__doc__)
    parser.add_argument("--tiles", action="store_true", help="time every tile as well")
    options = parser.parse_args(arguments)
    device = torch.device("cuda")
    reason = "no CUDA device" if not torch.cuda.is_available() else why_unavailable(device)
    if reason is not None:
        print(f"mmd_gpu: nothing to measure: {reason}", file=sys.stderr)
        return 1
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, forward + backward")
    worse = [shape for shape in SHAPES if not _compare(shape, device)]
    if options.tiles:
        _time_tiles(device)
    for shape in worse:
        print(f"mmd_gpu: ours errs more than another side at {shape}", file=sys.stderr)
    return 1 if worse else 0


def _sides(dtype: torch.dtype) -> dict[str, Loss]:
    sides: dict[str, Loss] = {
        "fused (ours)": mmd2_fused,
        "torch.cdist": lambda x, y: cdist_loss(x.float(), y.float(), CDIST_DEFAULT),
    }
    if importlib.util.find_spec("geomloss") is not None:
        from geomloss import SamplesLoss

        energy = SamplesLoss("energy", backend="tensorized")
        sides["geomloss"] = lambda x, y: 2 * energy(x.float(), y.float())
    return sides


def _compare(shape: tuple[int, int, int], device: torch.device) -> bool:
    exact = True
    for dtype in (torch.float32, torch.bfloat16):
        x, y = (cells.to(device, dtype) for cells in draw_cells(shape, torch.float32))
        # One set: differences in float64 take long.
        expected = _gradient(
            lambda x, y: cdist_loss(x, y, CDIST_EXACT), x[:1].double(), y[:1].double()
        )
        errors = {}
        for name, loss in _sides(dtype).items():
            result = _gradient(loss, x[:1], y[:1])
            errors[name] = [
                float((mine.double() - true).norm() / true.norm())
                for mine, true in zip(result, expected, strict=True)
            ]
            milliseconds, peak_mib = _cost(loss, x, y)
            print(
                f"{'x'.join(map(str, shape)):>14} {str(dtype)[6:]:>9} {name:13} "
                f"{milliseconds:9.3f} ms {peak_mib:9.0f} MiB  error of loss {errors[name][0]:.1e}, "
                f"gradient {errors[name][1]:.1e}"
            )
        ours = errors.pop("fused (ours)")
        exact = exact and all(ours[0] <= theirs[0] for theirs in errors.values())
    return exact


def _gradient(loss: Loss, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    loss_B = loss(x, y)
    return loss_B.detach(), torch.autograd.grad(loss_B.sum(), x)[0]


def _cost(loss: Loss, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return the median milliseconds and the peak MiB above what the cells take."""
    from triton.testing import do_bench

    _gradient(loss, x, y)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _gradient(loss, x, y)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return do_bench(lambda: _gradient(loss, x, y), quantiles=[0.5]), peak / 2**20


def _time_tiles(device: torch.device) -> None:
    gpu = tiles.generation(torch.cuda.get_device_capability(device))
    for shape in SHAPES:
        for dtype, precision in ((torch.float32, "tf32x3"), (torch.bfloat16, "bf16x3")):
            x, y = (cells.to(device, dtype) for cells in draw_cells(shape, torch.float32))
            for table in (tiles.DISTANCE_TILES, tiles.GRADIENT_TILES):
                for tile in table[gpu, precision]:
                    with _only(table, (gpu, precision), tile):
                        milliseconds, _ = _cost(mmd2_fused, x, y)
                    print(f"{shape} {tile}: {milliseconds:.3f} ms")


@contextmanager
def _only(table: dict, key: tuple, tile: tuple) -> Iterator[None]:
    """Leave the choice of one tile."""
    before = table[key]
    table[key] = (tile,)
    try:
        yield
    finally:
        table[key] = before


if __name__ == "__main__":
    sys.exit(main())
