import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import differential
from benchmarks.differential import check_p_values
from benchmarks.errors import BenchmarkError
from benchmarks.harness import REPO_ROOT, Comparison, Measurement, Side, compare, run_side
from benchmarks.mmd import check_errors
from benchmarks.preprocess import check_same_genes
from benchmarks.record import ResultFile
from tests.support.benchmark_tasks import burn, fail, hold_memory, sleep

MIB = 2**20


def accept(results) -> None:
    pass


def test_sides_alternate_and_the_ratio_is_that_of_their_cpu_seconds(tmp_path):
    log = str(tmp_path / "order")
    sides = [
        Side("short", burn, {"cpu_s": 0.1, "log": log, "name": "A"}),
        Side("long", burn, {"cpu_s": 0.15, "log": log, "name": "B"}, calls=2),
    ]
    comparison = compare("burning", sides, 2, accept, ["a note"])
    assert Path(log).read_text(encoding="ascii") == "ABABAB"  # a warm-up and two rounds
    assert comparison.ratios("long", "cpu_s") == pytest.approx([1.5, 1.5], rel=0.1)
    assert min(comparison.values("long", "process_cpu_s")) > 0.3  # both calls, and the start
    table = comparison.table()
    assert "long / short" in table
    assert "1.5" in table
    assert "a note" in table


def test_waiting_is_wall_time_and_not_cpu_time():
    measurement, _ = run_side(Side("sleep", sleep, {}))
    assert measurement.wall_s >= 0.3
    assert measurement.cpu_s < 0.1


def test_peak_memory_is_that_of_the_child_alone():
    held_here = b"x" * (300 * MIB)
    small, _ = run_side(Side("small", hold_memory, {"mib": 1}))
    large, arrays = run_side(Side("large", hold_memory, {"mib": 200}))
    assert len(held_here) > small.peak_rss_bytes
    assert large.peak_rss_bytes - small.peak_rss_bytes == pytest.approx(199 * MIB, rel=0.1)
    assert large.peak_growth_bytes == pytest.approx(200 * MIB, rel=0.1)
    assert arrays["length"] == 200 * MIB


def test_a_failing_side_is_named_with_its_own_words():
    with pytest.raises(BenchmarkError, match=r"(?s)'broken' ended with status 1.*no such thing"):
        run_side(Side("broken", fail, {}))


def test_sides_that_disagree_are_not_compared():
    def check(results) -> None:
        if results["a"]["value"] != results["b"]["value"]:
            raise BenchmarkError("different values")

    sides = [Side("a", burn, {"cpu_s": 0.0}), Side("b", burn, {"cpu_s": 0.001})]
    with pytest.raises(BenchmarkError, match="different values"):
        compare("a and b", sides, 1, check)


@pytest.fixture
def comparison() -> Comparison:
    def cost(cpu_s: float) -> Measurement:
        return Measurement(cpu_s, 2 * cpu_s, 3 * cpu_s, 10 * MIB, 4 * MIB)

    costs = [(1.0, 2.0), (2.0, 12.0), (4.0, 12.0)]
    return Comparison(
        "made up", tuple({"ours": cost(ours), "theirs": cost(theirs)} for ours, theirs in costs)
    )


def test_the_ratio_is_the_median_of_pairs_not_the_pair_of_medians(comparison):
    described = comparison.describe()
    assert described["medians"]["theirs"]["cpu_s"] / described["medians"]["ours"]["cpu_s"] == 6
    assert described["ratios"]["theirs / ours"]["cpu_s"] == {"min": 2, "median": 3, "max": 6}
    assert "2.00 / 3.00 / 6.00" in comparison.table()


def test_a_result_file_says_where_it_comes_from(tmp_path, comparison):
    path = tmp_path / "results" / "made_up.json"
    ResultFile(path, "python -m benchmarks made_up", {"rounds": 3}).write([comparison])
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["command"] == "python -m benchmarks made_up"
    assert content["settings"] == {"rounds": 3}
    assert content["hardware"]["cores"] >= 1
    assert content["hardware"]["cpu"]
    assert content["versions"]["numpy"] == np.__version__
    assert {"commit", "date"} <= content.keys()
    assert content["comparisons"] == [comparison.describe()]
    assert content["complete"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["preprocess", "mdd"], "unknown benchmark 'mdd': choose from preprocess, loader, mmd"),
        (["--rounds", "0"], "'0' is not a whole number of at least 1"),
    ],
)
def test_a_wrong_command_is_refused_before_anything_runs(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_benchmark_without_a_comparison_fails_and_leaves_no_file(tmp_path, monkeypatch, capsys):
    def refuse(settings):
        raise BenchmarkError(f"refused after {settings.rounds} rounds")
        yield

    monkeypatch.setitem(command.BENCHMARKS, "mmd", refuse)
    assert command.main(["mmd", "--rounds", "2", "--results", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "mmd: refused after 2 rounds" in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_benchmark_writes_and_prints_what_it_compared(tmp_path, monkeypatch, capsys, comparison):
    monkeypatch.setitem(command.BENCHMARKS, "mmd", lambda settings: [comparison])
    assert command.main(["mmd", "--rounds", "2", "--results", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "mmd.json").read_text(encoding="utf-8"))
    assert content["command"] == "python -m benchmarks mmd --rounds 2"
    assert comparison.table() in capsys.readouterr().out


def test_no_folder_of_this_machine_is_recorded(tmp_path, monkeypatch, comparison):
    monkeypatch.setitem(command.BENCHMARKS, "mmd", lambda settings: [comparison])
    folder = tmp_path / "atlases"
    for given in (["--folder", str(folder)], [f"--folder={folder}"]):
        command.main(["mmd", *given, f"--results={tmp_path}", "--depth", "0.5"])
        text = (tmp_path / "mmd.json").read_text(encoding="utf-8")
        assert str(tmp_path) not in text
        assert json.loads(text)["command"] == "python -m benchmarks mmd --depth 0.5"
        assert json.loads(text)["settings"]["depth"] == 0.5
    for path in (REPO_ROOT / "benchmarks" / "results").glob("*.json"):
        assert "folder" not in json.loads(path.read_text(encoding="utf-8"))["settings"]


def test_what_was_compared_before_an_error_is_kept(tmp_path, monkeypatch, capsys, comparison):
    def refuse_later(settings):
        yield comparison
        raise BenchmarkError("the second does not agree")

    monkeypatch.setitem(command.BENCHMARKS, "mmd", refuse_later)
    assert command.main(["mmd", "--results", str(tmp_path)]) == 1
    content = json.loads((tmp_path / "mmd.json").read_text(encoding="utf-8"))
    assert content["comparisons"] == [comparison.describe()]
    assert not content["complete"]
    assert content["missing"] == "the second does not agree"
    captured = capsys.readouterr()
    assert comparison.table() in captured.out
    assert "mmd: the second does not agree" in captured.err


def test_each_comparison_is_written_before_the_next_begins(tmp_path, monkeypatch, comparison):
    path = tmp_path / "mmd.json"
    second = replace(comparison, title="another")
    seen = []

    def look(settings):
        for finding in (comparison, second, replace(second, notes=("newer",))):
            yield finding
            seen.append(json.loads(path.read_text(encoding="utf-8")))

    monkeypatch.setitem(command.BENCHMARKS, "mmd", look)
    assert command.main(["mmd", "--results", str(tmp_path)]) == 0
    assert [content["complete"] for content in seen] == [False] * 3
    assert "still runs" in seen[0]["missing"]
    titles = [[item["title"] for item in content["comparisons"]] for content in seen]
    assert titles == [["made up"], ["made up", "another"], ["made up", "another"]]
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["comparisons"][1]["notes"] == ["newer"]
    assert content["complete"]


def test_one_other_gene_is_refused():
    genes = np.arange(10) < 4
    check_same_genes({"ours": {"highly_variable": genes}, "scanpy": {"highly_variable": genes}})
    other = np.roll(genes, 1)
    with pytest.raises(BenchmarkError, match="differ on 2 highly variable genes"):
        check_same_genes({"ours": {"highly_variable": genes}, "scanpy": {"highly_variable": other}})


def test_the_sides_of_differential_agree_on_a_small_table(tmp_path, monkeypatch):
    sizes = {"NUM_CELLS": 300, "NUM_GENES": 60, "NUM_PERTURBATIONS": 3}
    for name, size in sizes.items():
        monkeypatch.setattr(differential, name, size)
    path = tmp_path / "cells.h5ad"
    differential._simulate(path)
    results = {}
    for side, prepare in (
        ("ours", differential.prepare_ours),
        ("scanpy", differential.prepare_scanpy),
    ):
        task = prepare(str(path))
        results[side] = task.collect(task.run())
    assert results["ours"]["p_value"].shape == (3, 60)
    check_p_values(results)


@pytest.mark.parametrize("factor", [1 + 2e-6, 1 - 2e-6, np.nan])
def test_one_other_p_value_is_refused(factor):
    ours = {"perturbations": ["p"], "genes": ["g", "h"], "p_value": np.array([[0.3, 1e-40]])}
    check_p_values({"ours": ours, "scanpy": ours})
    theirs = {**ours, "p_value": ours["p_value"] * [1, factor]}
    with pytest.raises(BenchmarkError, match="1 of 2 p-values"):
        check_p_values({"ours": ours, "scanpy": theirs})


def test_a_less_exact_loss_is_refused():
    expected = {"loss": np.ones(2), "gradient": np.ones((2, 3, 4))}

    def off_by(error):
        return {name: values * (1 + error) for name, values in expected.items()}

    errors = check_errors({"ours": off_by(1e-5), "plain": off_by(1e-5)}, expected)
    assert errors["ours"] == pytest.approx((1e-5, 1e-5))
    with pytest.raises(BenchmarkError, match="less exact"):
        check_errors({"ours": off_by(1.2e-5), "plain": off_by(1e-5)}, expected)
    with pytest.raises(BenchmarkError, match="does not compute this loss"):
        check_errors({"ours": off_by(0), "plain": off_by(0.5)}, expected)
