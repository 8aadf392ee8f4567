"""The fused MMD in Triton's interpreter: ``tests/support/fused_checks.py`` says what must hold."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from state.mmd import fused_tiles as tiles
from state.mmd.dispatch import mmd_loss
from tests.support.fused_checks import CHECKS

REPO_ROOT = Path(__file__).resolve().parents[3]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed (it is in the dev extra on Linux x86-64)",
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("fused") / "results.json"
    run = subprocess.run(
        [sys.executable, "-m", "tests.support.mmd_interpreter", str(out)],
        cwd=REPO_ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(REPO_ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    print(run.stdout)
    return json.loads(out.read_text(encoding="utf-8"))


@needs_triton
@pytest.mark.parametrize("name", CHECKS)
def test_in_the_interpreter(results: dict[str, str], name: str):
    assert results[name] == "ok", results[name]


@needs_triton
def test_outside_the_interpreter_cpu_tensors_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cells = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match="'triton' cannot run: the cells are on cpu"):
        mmd_loss(cells, cells, impl="triton")


def test_without_triton_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    cells = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match=r"triton is not installed \(pip install 'statewide\[gpu"):
        mmd_loss(cells, cells, impl="triton")
    assert mmd_loss(cells, cells).item() == 0


@pytest.mark.parametrize("kernel", ["energy", "gaussian_mix"])
@pytest.mark.parametrize("key", tiles.DISTANCE_TILES)
@pytest.mark.parametrize("num_cells", [(1, 1), (41, 37), (65, 3), (512, 512)])
@pytest.mark.parametrize("num_sets", [1, 16])
def test_a_tile_divides_what_it_walks_over(key, kernel, num_cells, num_sets):
    x_rows, y_rows = tiles.padded_rows(*num_cells)
    genes = tiles.round_up(271, tiles.GENE_PADDING)
    distance = tiles.choose_distance_tile(*key, kernel, num_sets, x_rows, y_rows)
    gradient = tiles.choose_gradient_tile(*key, num_sets, x_rows, genes)
    assert x_rows >= num_cells[0]
    assert y_rows >= num_cells[1]
    divided = (
        *(x_rows % distance.block, y_rows % distance.block, genes % distance.block_genes),
        *(x_rows % gradient.block_cells, genes % gradient.block_genes),
        (x_rows + y_rows) % gradient.block_points,
        *(x_rows % tiles.CENTRE_BLOCK_CELLS, y_rows % tiles.CENTRE_BLOCK_CELLS),
    )
    assert not any(divided)
    assert kernel == "energy" or distance.block == 64


def test_large_inputs_take_large_tiles_and_small_ones_more_programs():
    large = tiles.choose_distance_tile(90, "tf32x3", "energy", 16, 512, 512)
    small = tiles.choose_distance_tile(90, "tf32x3", "energy", 1, 128, 128)
    assert (large.block, small.block) == (128, 64)
