"""Perturbation features: the file, the policies for missing names, and every refusal."""

import pickle
from pathlib import Path

import pytest
import torch

from state.config import ConfigError, FeatureConfig
from state.transition.features import FeatureTable, load_perturbation_features
from tests.support.data import data_path

NAMES = ("STAT1", "ctrl", "IRF1", "JAK2")


@pytest.fixture
def feature_file(tmp_path: Path) -> Path:
    path = tmp_path / "features.pt"
    vectors = {
        "STAT1": torch.tensor([1.0, 2.0, 5.0]),
        "IRF1": torch.tensor([3.0, 6.0, 5.0], dtype=torch.float16),
        "other": torch.tensor([9.0, 9.0, 9.0]),
        "ctrl": torch.tensor([7.0, 7.0, 7.0]),
    }
    torch.save(vectors, path)
    return path


def load(path: Path | None, names=NAMES, **settings) -> FeatureTable:
    return load_perturbation_features(FeatureConfig(path=path, **settings), names, "ctrl")


def test_rows_follow_the_store_and_the_control_is_zero(feature_file):
    table = load(feature_file, ("IRF1", "ctrl", "STAT1"))
    assert table.names == ("IRF1", "ctrl", "STAT1")
    assert table.values.tolist() == [[3, 6, 5], [0, 0, 0], [1, 2, 5]]
    assert table.values.dtype == torch.float32
    assert table.missing == table.dropped == ()


@pytest.mark.parametrize(
    ("policy", "row", "dropped"),
    [("mean", [2, 4, 5], ()), ("zero", [0, 0, 0], ()), ("drop", [0, 0, 0], ("JAK2",))],
)
def test_missing_policies(feature_file, policy, row, dropped):
    table = load(feature_file, missing=policy)
    assert table.names == NAMES
    assert table.values[3].tolist() == row
    assert table.values[0].tolist() == [1, 2, 5]
    assert table.missing == ("JAK2",)
    assert table.dropped == dropped


def test_missing_names_are_listed_with_the_nearest_known_and_the_key(feature_file):
    with pytest.raises(ConfigError) as caught:
        load(feature_file, ("ctrl", "stat1", "IRF-1", "IRF1", "XYZZY"))
    message = str(caught.value)
    assert "3 of 4 perturbations" in message
    assert "'stat1' (known: 'STAT1')" in message
    assert "'IRF-1' (known: 'IRF1')" in message
    assert "'XYZZY'." in message
    assert "features.missing" in message
    assert str(feature_file) in message


def test_a_long_list_of_missing_names_is_cut(feature_file):
    names = [f"gene{i}" for i in range(15)]
    with pytest.raises(ConfigError, match=r"'gene9' and 5 more\."):
        load(feature_file, ["ctrl", *names])


@pytest.mark.parametrize("policy", ["mean", "zero", "drop"])
def test_no_policy_saves_a_file_that_knows_no_perturbation(feature_file, policy):
    with pytest.raises(ConfigError, match="for none of the 2 perturbations"):
        load(feature_file, ("ctrl", "stat1", "irf1"), missing=policy)


def test_one_hot_without_a_file():
    table = load(None)
    assert table.values.tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert table.missing == ()


def test_only_controls_is_refused():
    with pytest.raises(ConfigError, match="no perturbation besides the control 'ctrl'"):
        load(None, ("ctrl",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(3)], "holds a list"),
        ({}, "empty dict"),
        ({1: torch.ones(3)}, "the key 1"),
        ({"STAT1": [1.0, 2.0]}, r"'STAT1' is \[1.0, 2.0\]"),
        ({"STAT1": torch.ones(1, 3)}, r"shape \[1, 3\]"),
        ({"STAT1": torch.ones(3), "IRF1": torch.ones(4)}, r"widths: 3 \('STAT1'\), 4 \('IRF1'\)"),
        ({n: torch.tensor([1.0, torch.nan]) for n in NAMES}, "'STAT1', 'IRF1', 'JAK2' have NaN"),
    ],
)
def test_content_that_is_no_feature_table_is_refused(tmp_path, content, message):
    path = tmp_path / "features.pt"
    torch.save(content, path)
    with pytest.raises(ConfigError, match=message) as caught:
        load(path)
    assert "features.path" in str(caught.value)


def test_file_that_is_missing_or_a_folder_is_refused(tmp_path):
    for path in (tmp_path / "absent.pt", tmp_path):
        with pytest.raises(ConfigError, match="does not exist or is not a file"):
            load(path)


@pytest.mark.parametrize(
    "content", [b"", b"gene,a,b\nSTAT1,1,2\n", b"\x80\x02garbage", b"PK\x03\x04"]
)
def test_file_that_is_not_torch_is_refused(tmp_path, content):
    path = tmp_path / "features.pt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="features.path") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_truncated_torch_file_is_refused(tmp_path, feature_file):
    path = tmp_path / "short.pt"
    path.write_bytes(feature_file.read_bytes()[:-200])
    with pytest.raises(ConfigError, match="features.path"):
        load(path)


def test_file_that_could_run_code_is_refused_unread(tmp_path):
    path = tmp_path / "evil.pt"
    marker = tmp_path / "was_here"
    path.write_bytes(pickle.dumps(_Touch(str(marker)), protocol=2))
    with pytest.raises(ConfigError, match="could run code"):
        load(path)
    torch.save({"STAT1": _Touch(str(marker))}, path)
    with pytest.raises(ConfigError, match="could run code"):
        load(path)
    assert not marker.exists()


class _Touch:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_standardized_uses_the_train_perturbations_only():
    values = torch.tensor([[1.0, 4.0, 0.1], [0, 0, 0], [3.0, 8.0, 0.1], [9.0, 0.0, 0.7]])
    table = FeatureTable(NAMES, values).standardized(("STAT1", "IRF1"))
    expected = [[-1, -1, 0], [0, 0, 0], [1, 1, 0], [7, -3, 0]]
    torch.testing.assert_close(table.values, torch.tensor(expected, dtype=torch.float32))
    assert table.values.dtype == torch.float32


def test_rows_without_a_feature_stay_zero_and_out_of_the_statistics(feature_file):
    table = load(feature_file, missing="zero")
    with_missing = table.standardized(("STAT1", "IRF1", "JAK2"))
    assert torch.equal(with_missing.values, table.standardized(("STAT1", "IRF1")).values)
    assert not with_missing.values[3].any()


def test_constant_column_with_rounding_is_zero():
    values = torch.tensor([[0.1], [0.1], [0.1]])
    table = FeatureTable(("a", "b", "c"), values).standardized(("a", "b", "c"))
    assert table.values.tolist() == [[0], [0], [0]]


def test_standardized_refuses_unknown_or_featureless_train_names():
    table = FeatureTable(("a", "b"), torch.tensor([[1.0], [0.0]]))
    with pytest.raises(ValueError, match=r"\['c'\]"):
        table.standardized(("a", "c"))
    with pytest.raises(ValueError, match="none of the train"):
        table.standardized(("b",))


def test_real_feature_file():
    path = data_path("gene_features/geneset_svd64_pert_features.pt")
    table = load(path, ("STAT1", "ctrl", "IRF1", "JAK2"))
    assert table.values.shape == (4, 64)
    assert table.values[[0, 2, 3]].abs().sum(1).min() > 0
    assert not table.values[1].any()
