"""Predict the time of the fused MMD on an A100 and an H100 from its compiled machine code.

``python -m benchmarks.mmd_roofline`` prints the tables of ``docs/kernels.md`` in Markdown. No GPU
is used and none was: registers and shared memory are read from the compiled kernels, bytes and
FLOPs are counted, and the time of a launch is the larger of what the memory and the tensor cores
need. Needs triton. Legend: B cell sets, S cells a side, G genes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from state.mmd import fused_tiles as tiles
from tests.support.mmd_listings import Job, centre_jobs, distance_jobs, gradient_jobs
from tests.support.triton_compile import Listing

SHAPES = ((8, 256, 2000), (16, 512, 2000), (4, 512, 18080), (16, 512, 18080))
PRECISIONS: tuple[tiles.Precision, ...] = ("tf32x3", "bf16x3")
KIB = 1024


@dataclass(frozen=True)
class Gpu:
    """What a data sheet says: NVIDIA A100 80 GB SXM and H100 SXM, dense."""

    name: str
    capability: int
    processors: int
    tensor_flops: dict[str, float]
    """A second, of one product: a third of TF32's and all of bfloat16's."""
    bytes_per_s: float
    shared_bytes: int
    registers: int = 65536
    threads: int = 2048
    blocks: int = 32


GPUS = (
    Gpu("A100", 80, 108, {"tf32x3": 156e12, "bf16x3": 312e12}, 2.0e12, 164 * KIB),
    Gpu("H100", 90, 132, {"tf32x3": 395e12, "bf16x3": 790e12}, 3.0e12, 228 * KIB),
)


def main() -> int:
    """Compile, and print one table of resources and one of times."""
    print("| kernel | registers | shared KiB | blocks per SM | occupancy | tensor ops |")
    print("|---|---:|---:|---:|---:|---:|")
    with TemporaryDirectory(prefix="roofline-") as name:
        for gpu in GPUS:
            for precision in PRECISIONS:
                for job in _jobs(gpu.capability, precision):
                    print(_resource_row(job, job.compile(work_dir=Path(name)), gpu))
    print()
    print(
        "| B x S x G | GPU | products | GFLOP | MiB | centre ms | distance ms | gradient ms | sum |"
    )
    print("|---|---|---|---:|---:|---:|---:|---:|---:|")
    for shape in SHAPES:
        for gpu in GPUS:
            for precision in PRECISIONS:
                print(_time_row(shape, gpu, precision))
    return 0


def _jobs(capability: int, precision: tiles.Precision) -> list[Job]:
    products = [*distance_jobs(capability, precision), *gradient_jobs(capability, precision)]
    chosen = [job for job in products if job.name.endswith(("energy-above", "-fp32"))]
    return [*centre_jobs(capability, precision), *chosen]


def blocks_per_processor(listing: Listing, gpu: Gpu) -> int:
    """Return how many blocks fit a multiprocessor: registers, shared memory, threads."""
    warps = listing.num_threads // 32
    # Registers are handed out to warps in units of 256.
    registers = warps * tiles.round_up(listing.registers * 32, 256)
    shared = listing.shared_bytes + KIB  # what the system takes of each block
    return min(
        gpu.registers // registers,
        gpu.shared_bytes // shared,
        gpu.threads // listing.num_threads,
        gpu.blocks,
    )


def _resource_row(job: Job, listing: Listing, gpu: Gpu) -> str:
    blocks = blocks_per_processor(listing, gpu)
    occupancy = blocks * listing.num_threads / gpu.threads
    return (
        f"| `{job.name}` | {listing.registers} | {listing.shared_bytes / KIB:.0f} | {blocks} | "
        f"{occupancy:.0%} | {listing.tensor_ops} |"
    )


def count_work(
    shape: tuple[int, int, int], gpu: int, precision: tiles.Precision
) -> dict[str, tuple[float, float]]:
    """Return the bytes and FLOPs of the launches: centring, distances, gradient.

    Bytes are those of each launch's input and output once: what the L2 cache (40 and 50 MB)
    does not serve again comes on top.
    """
    num_sets, num_cells, num_genes = shape
    rows, _ = tiles.padded_rows(num_cells, num_cells)
    genes = tiles.round_up(num_genes, tiles.GENE_PADDING)
    tile = tiles.choose_distance_tile(gpu, precision, "energy", num_sets, rows, rows)
    num_tiles = 2 * rows // tile.block
    pairs = num_tiles * (num_tiles + 1) // 2
    split = precision == "bf16x3"
    cells = num_sets * num_cells * num_genes * (2 if split else 4)
    points = num_sets * 2 * rows * genes * 4
    weights = num_sets * rows * 2 * rows * 4
    return {
        # x and y are read twice: for the mean, and to subtract it.
        "centre": (4 * cells + points, 0),
        # The points are read on the diagonal and above it.
        "distance": (
            2 * points + weights,
            2 * num_sets * pairs * tile.block**2 * genes * (4 if split else 3),
        ),
        "gradient": (
            points + weights + cells,
            2 * num_sets * rows * 2 * rows * genes * 3,
        ),
    }


def _time_row(shape: tuple[int, int, int], gpu: Gpu, precision: tiles.Precision) -> str:
    work = count_work(shape, gpu.capability, precision)
    times_ms = {
        name: 1e3 * max(moved / gpu.bytes_per_s, flops / gpu.tensor_flops[precision])
        for name, (moved, flops) in work.items()
    }
    moved, flops = (sum(parts) for parts in zip(*work.values(), strict=True))
    launches = " | ".join(f"{time:.3f}" for time in times_ms.values())
    return (
        f"| {'x'.join(map(str, shape))} | {gpu.name} | {precision} | {flops / 1e9:.0f} | "
        f"{moved / 2**20:.0f} | {launches} | {sum(times_ms.values()):.3f} |"
    )


if __name__ == "__main__":
    sys.exit(main())
