"""Every tile of the fused MMD, compiled for the A100 and the H100 without either.

A kernel that spills registers, needs a stack, more shared memory than there is, or does without
tensor cores is found in its machine code.
"""

import importlib.util
import itertools
import os

import pytest

from state.mmd.fused_tiles import DISTANCE_TILES

if importlib.util.find_spec("triton") is None:
    pytest.skip(
        "triton is not installed (it is in the dev extra on Linux x86-64)", allow_module_level=True
    )
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: nothing can be compiled", allow_module_level=True)

from tests.support.mmd_listings import centre_jobs, distance_jobs, gradient_jobs
from tests.support.triton_compile import Listing

# Bytes a block may have (CUDA programming guide, table of compute capabilities).
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024}
# What every GPU of capability 8.0 and later offers: the tiles of sm_80 serve them all.
SMALLEST_SHARED_LIMIT = 99 * 1024
PRODUCTS = list(
    itertools.chain.from_iterable(
        (*distance_jobs(*key), *gradient_jobs(*key)) for key in DISTANCE_TILES
    )
)
CENTRES = list(itertools.chain.from_iterable(centre_jobs(*key) for key in DISTANCE_TILES))


def check_memory(listing: Listing, capability: int) -> None:
    assert listing.stack_bytes == 0, listing
    assert listing.local_accesses == 0, listing
    assert listing.shared_bytes <= SHARED_LIMITS[capability], listing
    if capability == 80:
        assert listing.shared_bytes <= SMALLEST_SHARED_LIMIT, listing


@pytest.mark.parametrize("job", PRODUCTS, ids=[job.name for job in PRODUCTS])
def test_products_run_on_tensor_cores_without_spills(job, tmp_path):
    listing = job.compile(work_dir=tmp_path)
    check_memory(listing, job.capability)
    assert listing.tensor_ops > 0, listing


@pytest.mark.parametrize("job", CENTRES, ids=[job.name for job in CENTRES])
def test_centring_does_not_spill(job, tmp_path):
    check_memory(job.compile(work_dir=tmp_path), job.capability)


def test_a_tile_that_spills_and_one_without_tensor_cores_are_found(tmp_path, monkeypatch):
    from state.mmd import fused_tiles

    key = (80, "tf32x3")
    monkeypatch.setitem(fused_tiles.DISTANCE_TILES, key, (fused_tiles.DistanceTile(128, 32, 4, 3),))
    listing = distance_jobs(*key)[1].compile(work_dir=tmp_path)
    assert listing.stack_bytes > 0
    assert listing.local_accesses > 0
    listing = centre_jobs(*key)[0].compile(work_dir=tmp_path)
    assert listing.tensor_ops == 0


def test_the_roofline_counts_blocks_and_work():
    from benchmarks.mmd_roofline import GPUS, blocks_per_processor, count_work

    h100 = GPUS[1]
    listing = Listing(168, 0, 49 * 1024, 128, 0, 1, {})
    # 65,536 registers / (4 warps x 32 x 168) = 3.05; 228 KiB / (49 + 1) KiB = 4.56.
    assert blocks_per_processor(listing, h100) == 3
    work = count_work((16, 512, 2048), 90, "tf32x3")
    u = 16 * 512**2 * 2048 * 2
    # Of 6u: xy is 2u, xx and yy are symmetric, but for whole tiles on the diagonal: 36 of 64.
    assert work["distance"][1] == 3 * 4 * u * 36 / 64
    assert work["gradient"][1] == 3 * 2 * u
    assert work["gradient"][0] == 4 * (16 * 1024 * 2048 + 16 * 512 * 1024 + 16 * 512 * 2048)
