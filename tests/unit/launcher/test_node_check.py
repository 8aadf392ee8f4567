"""Nodes with other versions, and run folders that only look shared."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from launcher import node_check
from launcher.errors import LaunchError
from launcher.node_check import (
    NodeOrder,
    NodeReport,
    examine_node,
    open_probe,
    read_versions,
    refuse_unfit,
)
from launcher.run_folder import PROBE_NAME, RunFolder


@pytest.fixture(autouse=True)
def _settled_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(node_check, "_SETTLE_S", 0.05)
    monkeypatch.setattr(node_check, "_SECONDS_BETWEEN_LOOKS", 0.01)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def order_for(run_dir: Path, secret: str, *inputs: Path) -> NodeOrder:
    return NodeOrder("ab12" * 8, run_dir, secret, inputs)


def complaint(order: NodeOrder, report: NodeReport) -> str:
    with pytest.raises(LaunchError) as caught:
        refuse_unfit({order.node_id: report}, [order], {})
    return str(caught.value)


def test_a_node_that_shares_everything_is_fit_and_leaves_nothing(run_dir: Path, tmp_path: Path):
    atlas = tmp_path / "atlas.h5ad"
    atlas.touch()
    with open_probe(run_dir) as secret:
        order = order_for(run_dir, secret, atlas)
        report = examine_node(order)
        assert report.problems == ()
        refuse_unfit({order.node_id: report}, [order], {})
    assert list(run_dir.iterdir()) == []


def test_a_folder_that_is_not_there_is_named(run_dir: Path, tmp_path: Path):
    with open_probe(run_dir) as secret:
        order = order_for(tmp_path / "not_mounted", secret)
        said = complaint(order, examine_node(order))
    assert f"output_dir {tmp_path / 'not_mounted'} does not exist here" in said
    assert "node ab12ab12ab12" in said


def test_a_folder_of_the_same_name_on_the_node_s_own_disk_is_told(run_dir: Path, tmp_path: Path):
    with open_probe(run_dir) as secret:
        own_disk = tmp_path / "own_disk"
        shutil.copytree(run_dir, own_disk)
        (own_disk / PROBE_NAME / "driver").write_text("of an earlier run")
        report = examine_node(order_for(own_disk, secret))
    assert "is another folder here: it is not on storage that all nodes share" in report.problems[0]


def test_what_the_node_writes_must_reach_the_driver(run_dir: Path, tmp_path: Path):
    """Such as a copy of the folder, synchronised in one direction."""
    with open_probe(run_dir) as secret:
        copy = tmp_path / "copy"
        shutil.copytree(run_dir, copy)
        report = examine_node(order_for(copy, secret))
        assert report.problems == ()
        said = complaint(order_for(run_dir, secret), report)
    assert "the driver does not see it" in said


def test_a_folder_that_cannot_be_written_is_named(run_dir: Path):
    with open_probe(run_dir) as secret:
        order = replace(order_for(run_dir, secret), node_id="no/such/folder")
        assert "cannot be written here" in examine_node(order).problems[0]


def test_an_input_that_a_node_does_not_see_is_named(run_dir: Path, tmp_path: Path):
    with open_probe(run_dir) as secret:
        report = examine_node(order_for(run_dir, secret, tmp_path / "atlas.h5ad"))
    assert report.problems == (f"input {tmp_path / 'atlas.h5ad'} does not exist here",)


@pytest.mark.parametrize("name", ["python", "torch", "ray", "deepspeed", "statewide"])
def test_each_version_must_be_equal(name: str, run_dir: Path):
    assert name in read_versions()
    with open_probe(run_dir) as secret:
        order = order_for(run_dir, secret)
        report = examine_node(order)
        other = replace(report, versions={**report.versions, name: "9.9"})
        said = complaint(order, other)
    assert f"other versions: {name} 9.9 (here {read_versions()[name]})" in said


def test_the_code_counts_and_not_only_its_version(tmp_path: Path, monkeypatch):
    before = read_versions()["statewide"]
    root = tmp_path / "elsewhere"
    for package in ("launcher", "state", "data_store"):
        shutil.copytree(Path(node_check.__file__).parents[1] / package, root / package)
    monkeypatch.setattr("launcher.__file__", str(root / "launcher" / "__init__.py"))
    assert read_versions.__wrapped__()["statewide"] == before
    with (root / "state" / "losses.py").open("a") as file:
        file.write("\n# changed\n")
    assert read_versions.__wrapped__()["statewide"] != before


def test_a_node_that_cannot_answer_and_many_problems_are_told_shortly(run_dir: Path):
    lost = {f"{number:032x}": "No module named 'launcher'" for number in range(7)}
    with pytest.raises(LaunchError) as caught:
        refuse_unfit({}, [order_for(run_dir, "s")], lost)
    said = str(caught.value)
    assert "7 problems on the cluster's nodes" in said
    assert said.count("No module named 'launcher'") == 5
    assert "and 2 more" in said


def test_a_probe_left_by_a_killed_run_does_not_make_the_folder_foreign(run_dir: Path):
    (run_dir / PROBE_NAME).mkdir()
    with RunFolder(run_dir).lock(), open_probe(run_dir):
        pass
    assert not (run_dir / PROBE_NAME).exists()
