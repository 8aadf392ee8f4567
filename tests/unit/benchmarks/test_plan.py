"""The plan of a larger cluster: formulas on a case computed by hand, figures as measured."""

import json
import re

import pytest

from benchmarks import plan as planning
from benchmarks.harness import REPO_ROOT
from benchmarks.plan import Model, describe, plan, vcc_model

# A step of one second at 35 % of 989 TFLOP/s; 4 GB of gradients, 20 GB of checkpoint.
MODEL = Model(parameters=10**9, flops=0.35 * 989e12, rows=100_000, cells=50_000)
# As counts, of 0.21 / 0.47 as many non-zeros: 100,000 rows / (336,000 / s x 0.4468) = 0.666 s.
HELD_S, STREAMED_S = 0.66610, 1.80492


def test_one_node_by_hand():
    found = plan(1, 1, MODEL)
    assert found.gpus == 8
    assert found.compute_s == pytest.approx(1)
    # 2 x 7/8 x 4 GB over 450 GB/s, and 14 hops of 5 us.
    assert found.communicate_s == pytest.approx(0.0155556 + 0.00007, rel=1e-4)
    assert found.sent_by_gpu_bytes == 7e9
    assert found.sent_by_node_bytes == 0
    assert found.load_s == pytest.approx(HELD_S, rel=1e-4)
    # Loading is faster than the step and hidden behind it.
    assert found.step_s == pytest.approx(1.0156256, rel=1e-6)
    assert found.efficiency == found.fed_efficiency == pytest.approx(1 / 1.0156256, rel=1e-6)
    assert found.cores_per_gpu == pytest.approx(HELD_S / 1.0156256, rel=1e-4)
    assert found.steps_per_epoch == pytest.approx(183_097 / 400_000)
    # 221,273 cells of 8,497.6 non-zeros in 4 bytes, and 1,032 bytes each.
    assert found.held_bytes == pytest.approx(221_273 * (4 * 8_497.6 + 1_032))
    assert found.is_held
    assert found.read_at_start_bytes == pytest.approx(4.80 * 2**30)
    assert found.read_by_node_bytes_per_s == 0
    assert found.checkpoint_bytes == 20e9
    # Rank 0 writes the weights twice, 8 GB, and an eighth of 12 GB.
    assert found.checkpoint_s == pytest.approx(9.5)
    # 55 blocks on 96 cores: one after the other none has to wait.
    assert found.preprocess_s == pytest.approx(4096 * 185.8 / 221_273)


def test_eight_nodes_and_an_atlas_that_does_not_fit_by_hand():
    found = plan(8, 100, MODEL)
    # Between nodes each GPU carries an eighth: 2 x 7/8 x 0.5 GB over 50 GB/s, 7 more hops.
    expected_s = 0.0155556 + 0.0175 + 2 * 14 * 5e-6
    assert found.communicate_s == pytest.approx(expected_s, rel=1e-4)
    assert found.sent_by_gpu_bytes == pytest.approx(2 * 63 / 64 * 4e9)
    assert found.sent_by_node_bytes == pytest.approx(7e9)
    assert not found.is_held
    assert found.read_at_start_bytes == 0
    # Loading takes longer than the step: that is the step, and no GPU waits for another.
    assert found.step_s == found.load_s == pytest.approx(STREAMED_S, rel=1e-4)
    assert found.efficiency == 1
    assert found.gpu_share == pytest.approx(1 / STREAMED_S, rel=1e-4)
    rows_per_s = 8 * 50_000 / STREAMED_S
    assert found.read_by_node_bytes_per_s == pytest.approx(
        rows_per_s * 4.80 * 2**30 / 221_273, rel=1e-4
    )
    # 5,403 blocks on 768 cores: eight rounds.
    assert found.preprocess_s == pytest.approx(8 * 4096 * 185.8 / 221_273)


def test_what_it_rests_on_is_what_was_measured():
    results = json.loads((REPO_ROOT / "benchmarks" / "results" / "loader.json").read_text())
    notes = " ".join(note for each in results["comparisons"] for note in each["notes"])
    for name, rate in (
        ("resident, counts", planning.HELD_ROWS_PER_CPU_S),
        ("streamed, counts", planning.STREAMED_ROWS_PER_CPU_S),
    ):
        [said] = re.findall(rf"ours, {name}: ([\d,]+) rows per CPU second", notes)
        assert float(said.replace(",", "")) == pytest.approx(rate, rel=0.01)
    text = (REPO_ROOT / "docs" / "scaling.md").read_text()
    assert "| preprocess | 719.5 | 185.8 | 0.99 | 3.54 | 4.80 |" in text
    # And the bytes of a cell are those of docs/loading.md.
    row_bytes = plan(1, 1, MODEL).held_bytes / planning.CELLS
    assert row_bytes == pytest.approx(35_024, rel=0.001)


def test_the_documentation_shows_these_tables():
    text = (REPO_ROOT / "docs" / "scaling.md").read_text()
    for line in describe(vcc_model()).splitlines():
        assert line in text, f"run python -m benchmarks.plan again: {line}"
