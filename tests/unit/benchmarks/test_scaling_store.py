import pytest

from benchmarks.errors import BenchmarkError
from benchmarks.process_tree import TreeCost
from benchmarks.scaling_store import STAGES, ScalingTable, StageCost, fit_growth

CELLS = (25_000, 50_000, 100_000, 200_000)


def test_a_line_and_a_square_are_told_apart():
    linear = fit_growth(CELLS, [2 + n * 1e-4 for n in CELLS])
    assert 0.7 < linear.exponent < 0.8
    assert (linear.offset, linear.per_million) == pytest.approx((2, 100))
    assert linear.worst < 1e-9
    assert fit_growth(CELLS, [n**2 * 1e-9 for n in CELLS]).exponent == pytest.approx(2)
    assert fit_growth(CELLS, [n**2 * 1e-9 for n in CELLS]).worst > 0.2
    assert fit_growth(CELLS, [0.7] * 4).exponent == pytest.approx(0, abs=1e-9)
    with pytest.raises(BenchmarkError, match="not measured"):
        fit_growth(CELLS, [1, 1, 0, 1])


def test_the_table_has_every_stage_and_its_growth():
    costs = tuple(
        StageCost(stage, n, TreeCost(n * 1e-3, n * 2e-3, 2**30, 2**31), 3 * 2**30)
        for n in CELLS
        for stage in STAGES
    )
    table = ScalingTable("atlas", costs)
    text = table.table()
    assert "| 25,000 | preprocess | 25.0 | 50.0 | 1.00 | 2.00 | 3.00 |" in text
    assert "| verify | CPU s | 1.00 | 0.00 + 2000.00 per million cells | 0 % |" in text
    assert "| epoch | largest process GiB | 0.00 | 1.00 + 0.00 per million cells | 0 % |" in text
    assert table.describe()["growth"]["verify, CPU s"]["exponent"] == pytest.approx(1)
    # Two points always lie on a line.
    assert "exponent" not in ScalingTable("atlas", costs[:8]).table()
