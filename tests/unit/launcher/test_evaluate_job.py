"""A run with several contexts: each is judged by itself, as if it were a file of its own."""

import io

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from rich.console import Console

from data_store.schema import CellTable, ObsColumns, run_in_process
from launcher.evaluate_job import judge_predictions, print_leaderboard
from launcher.run_folder import RunFolder
from state.evaluate import evaluate
from state.metrics.profiles import Conventions

GENES = [f"G{number}" for number in range(40)]
LABELS = ["non-targeting"] * 30 + ["G1"] * 20 + ["G2"] * 20


def draw(seed, shift):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(1.0, 1.0 + shift, (len(LABELS), len(GENES))))
    return np.log1p(counts * 0.7).astype(np.float32)


@pytest.mark.parametrize("sparse", [False, True])
def test_each_context_is_judged_as_a_file_of_its_own(tmp_path, sparse):
    folder = RunFolder(tmp_path)
    folder.predictions.mkdir()
    # Contexts of unequal density, with their cells interleaved.
    order = np.random.default_rng(0).permutation(2 * len(LABELS))
    tables = {}
    for model, seed in {"real": 1, "state": 5}.items():
        values = {"a": draw(seed, 0.0), "b": draw(seed + 1, 6.0)}
        obs = pd.DataFrame({"target_gene": LABELS * 2, "line": ["a"] * 70 + ["b"] * 70})
        matrix = np.concatenate(list(values.values()))[order]
        obs = obs.iloc[order].set_index(np.array([f"c{number}" for number in range(140)]))
        cells = sp.csr_matrix(matrix) if sparse else matrix
        table = ad.AnnData(cells, obs=obs.astype("category"), var=pd.DataFrame(index=GENES))
        table.write_h5ad(folder.predictions / f"{model}.h5ad")
        names = ("G1", "G2", "non-targeting")
        codes = np.array([names.index(label) for label in LABELS])
        tables[model] = {
            line: CellTable(part, tuple(GENES), codes, names, "non-targeting")
            for line, part in values.items()
        }
    columns = ObsColumns(cell_type_key="line")
    judged = judge_predictions(folder, columns, Conventions(), run_in_process)
    evaluation, effects = judged["state"]
    expected = pd.concat(
        evaluate(tables["real"][line], tables["state"][line]).per_perturbation.assign(line=line)
        for line in ("a", "b")
    )
    expected["perturbation"] += " (" + expected.pop("line") + ")"
    pd.testing.assert_frame_equal(
        evaluation.per_perturbation, expected.reset_index(drop=True), rtol=1e-6
    )
    assert effects.names.tolist() == ["G1 (a)", "G2 (a)", "G1 (b)", "G2 (b)"]


def test_only_models_that_are_ranked_are_compared_with_the_best_baseline(tmp_path):
    folder, said = RunFolder(tmp_path), io.StringIO()
    folder.evaluation.mkdir()
    columns = "des pds mae overall overall_low overall_high difference difference_low".split()
    rows = pd.DataFrame({name: 1.25 for name in [*columns, "difference_high"]}, index=range(3))
    rows["model"], rows["best_baseline"] = ["state", "ridge", "ceiling"], "ridge"
    rows["num_perturbations"] = 7
    rows.to_csv(folder.evaluation / "leaderboard.csv", index=False)
    print_leaderboard(folder, Console(file=said, width=200))
    assert "7 held-out perturbations" in said.getvalue()
    last = {
        line.split("│")[1].strip(): line.split("│")[-2].strip()
        for line in said.getvalue().splitlines()
        if line.startswith("│")
    }
    assert last == {"state": "+1.25 (+1.25 to +1.25)", "ridge": "-", "ceiling": "-"}
