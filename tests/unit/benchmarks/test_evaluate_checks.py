import numpy as np
import pytest
from scipy.stats import spearmanr

from benchmarks.errors import BenchmarkError
from benchmarks.evaluate_checks import ENERGY, RANKED, SIGNED, Exact, MetricCheck, check_tests

NUM_GENES = 6


def make_side(lfc_G, rank=None, **changes):
    """One perturbation, five of its six genes significant."""
    real_lfc = np.array([lfc_G], dtype=np.float64)
    pred_lfc = np.array([[0.1, 0.2, 0.3, 0.4, 0.5, 9.0]])
    true_rank = spearmanr(real_lfc[0, :5].astype(np.float32), pred_lfc[0, :5]).statistic
    return {
        "perturbation": np.array(["p"]),
        "mae": np.array([0.5]),
        RANKED: np.array([true_rank if rank is None else rank]),
        "real_lfc": real_lfc,
        "pred_lfc": pred_lfc,
        "real_fdr": np.array([[0.01] * 5 + [0.5]]),
        **changes,
    }


NEAR = [1.0, 2.0, 3.0, 3.00001, np.inf, 0.0]
SWAPPED = [1.0, 2.0, 3.00001, 3.0, np.inf, 0.0]


def test_a_rank_that_rounding_decides_is_counted_with_its_proof():
    check = MetricCheck()
    check({"ours": make_side(NEAR), "cell-eval": make_side(NEAR)})
    assert check.notes() == ()
    check({"ours": make_side(NEAR), "cell-eval": make_side(SWAPPED)})
    (note,) = check.notes()
    assert f"{RANKED} of p: of 5 significant genes 1 pair(s) change places and 0 their sign" in note


def test_a_sign_that_rounding_decides_is_counted_with_its_proof():
    def side(smallest, share):
        return make_side([smallest, 2.0, 3.0, 4.0, np.inf, 0.0], **{SIGNED: np.array([share])})

    check = MetricCheck()
    check({"ours": side(1e-6, 1.0), "cell-eval": side(-1e-6, 0.8)})
    (note,) = check.notes()
    assert f"{SIGNED} of p: of 5 significant genes 0 pair(s) change places and 1 their sign" in note
    with pytest.raises(BenchmarkError, match="log2_fold_change differ"):
        check({"ours": side(1e-3, 1.0), "cell-eval": side(-1e-3, 0.8)})
    with pytest.raises(BenchmarkError, match="from the same side"):
        check({"ours": side(1e-6, 1.0), "cell-eval": side(1e-6, 0.8)})


def test_a_correlation_is_held_to_its_definition():
    def side(value):
        return make_side(NEAR, **{ENERGY: np.array([value])})

    results = {"ours": side(0.5), "cell-eval": side(0.50003)}
    with pytest.raises(BenchmarkError, match=f"1 of 1 values of {ENERGY}"):
        MetricCheck()(results)

    def exact(value, rounding):
        return {ENERGY: Exact(np.array([value]), np.array([rounding]))}

    check = MetricCheck(exact(0.500001, 1e-4))
    check(results)
    assert "ours is at most 1.0e-06, cell-eval's 2.9e-05 from the definition" in check.notes()[0]
    for value, rounding in ((0.50003, 1e-4), (0.500001, 1e-5)):
        with pytest.raises(BenchmarkError, match="definition in float64"):
            MetricCheck(exact(value, rounding))(results)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        # Further apart than rounding brings them.
        (make_side([1.0, 2.0, 3.001, 3.0, np.inf, 0.0]), "log2_fold_change differ"),
        # Not the correlation of these fold changes.
        (make_side(NEAR, rank=0.9), "from the same side"),
        (make_side(SWAPPED, rank=0.95), "from the same side"),
        (make_side(SWAPPED, real_fdr=np.full((1, NUM_GENES), 0.01)), "other significant genes"),
        (make_side(SWAPPED, mae=np.array([0.51])), "1 of 1 values of mae"),
        (make_side(SWAPPED, perturbation=np.array(["q"])), "different rows"),
    ],
)
def test_other_differences_are_refused(theirs, message):
    with pytest.raises(BenchmarkError, match=message):
        MetricCheck()({"ours": make_side(NEAR), "cell-eval": theirs})


def test_one_other_fold_change_is_refused():
    names = ("p_value", "fdr", "statistic", "log2_fold_change")
    ours = {"pairs": np.array(["p a"]), **{name: np.array([np.inf]) for name in names}}
    check_tests({"ours": ours, "pdex": ours})
    with pytest.raises(BenchmarkError, match="log2_fold_change"):
        check_tests({"ours": ours, "pdex": {**ours, "log2_fold_change": np.array([3.0])}})
