"""``statewide embed query``: its tables, its index, and mistakes that leave nothing."""

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from data_store.schema import UserError
from launcher.cli import app

LABELS = ("x", "y")


def write(path: Path, num_cells: int, *, seed: int, width: int = 4, prefix: str = "r") -> Path:
    """Write cells of two kinds that lie in opposite directions."""
    rng = np.random.default_rng(seed)
    kind = np.arange(num_cells) % 2
    values = rng.standard_normal((num_cells, width)) * 0.2
    values[:, 0] += np.where(kind == 0, 3, -3)
    obs = pd.DataFrame({"kind": [LABELS[at] for at in kind]})
    obs.index = [f"{prefix}{number}" for number in range(num_cells)]
    ad.AnnData(obs=obs, obsm={"X_state": values.astype(np.float32)}).write_h5ad(path)
    return path


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    folder = tmp_path / "in"
    folder.mkdir()
    reference = write(folder / "reference.h5ad", 60, seed=0)
    return reference, write(folder / "query.h5ad", 11, seed=1, prefix="q")


def query(pair: tuple[Path, Path], *options: str | Path) -> str:
    arguments = ["embed", "query", *map(str, (*pair, *options))]
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


@pytest.mark.parametrize(("suffix", "read"), [("csv", pd.read_csv), ("parquet", pd.read_parquet)])
def test_both_tables(pair: tuple[Path, Path], tmp_path: Path, suffix: str, read, monkeypatch):
    monkeypatch.setattr("launcher.embed_query.CELLS_PER_SEARCH", 4)
    out = tmp_path / f"near.{suffix}"
    said = query(pair, "--out", out, "--label", "kind", "--neighbours", "5")
    near, votes = read(out), read(tmp_path / f"near_labels.{suffix}")
    columns = ["query_cell", "rank", "reference_cell", "similarity", "reference_kind"]
    assert near.columns.tolist() == columns
    assert near["rank"].tolist() == [1, 2, 3, 4, 5] * 11
    vectors = [ad.read_h5ad(path).obsm["X_state"] for path in pair]
    reference, cells = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in vectors)
    cosine = cells @ reference.T
    true = [f"r{place}" for place in np.argsort(-cosine, axis=1)[:, :5].ravel()]
    assert near["reference_cell"].tolist() == true
    np.testing.assert_allclose(
        near["similarity"], -np.sort(-cosine, axis=1)[:, :5].ravel(), atol=1e-5
    )
    assert votes["query_cell"].tolist() == [f"q{number}" for number in range(11)]
    assert votes["kind"].tolist() == [LABELS[number % 2] for number in range(11)]
    assert votes["share"].tolist() == [1.0] * 11
    assert "11 of 11 cells (1.0000)" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", out.name, votes_name(out)]


def votes_name(out: Path) -> str:
    return f"{out.stem}_labels{out.suffix}"


def test_a_kept_index_is_used_again_and_not_for_other_cells(
    pair: tuple[Path, Path], tmp_path: Path
):
    out, index = tmp_path / "near.csv", tmp_path / "atlas.index"
    assert "built" in query(pair, "--out", out, "--index", index)
    first = out.read_bytes()
    made = index.stat().st_mtime_ns
    assert "built" not in query(pair, "--out", out, "--index", index)
    assert (out.read_bytes(), index.stat().st_mtime_ns) == (first, made)
    write(pair[0], 60, seed=5)
    with pytest.raises(UserError, match="other vectors"):
        query(pair, "--out", out, "--index", index)
    assert out.read_bytes() == first


def test_an_approximate_search_says_its_recall(pair: tuple[Path, Path], tmp_path: Path):
    said = query(pair, "--out", tmp_path / "near.csv", "--method", "approximate")
    assert "of the true 15 neighbours of 11 query cells" in said


def test_mistakes_leave_nothing(pair: tuple[Path, Path], tmp_path: Path):
    reference, cells = pair
    wide = write(tmp_path / "in" / "wide.h5ad", 20, seed=0, width=6)
    broken = ad.read_h5ad(cells)
    broken.obsm["X_state"][9] = np.nan
    broken.write_h5ad(tmp_path / "in" / "broken.h5ad")
    out = tmp_path / "near.csv"
    index = ("--index", tmp_path / "i")
    for inputs, options, message in (
        ((reference, wide), (), "is 4 wide in .*reference.h5ad and 6 in .*wide.h5ad"),
        ((reference, tmp_path / "in" / "broken.h5ad"), index, "not finite for cell 'q9'"),
        (pair, ("--neighbours", "61"), "61 is more than the 60 cells"),
        (pair, ("--key", "X_pca"), r"no obsm\['X_pca'\]"),
        (pair, ("--label", "nope"), "no column 'nope'"),
        (pair, ("--method", "guess"), "must be one of exact, approximate"),
        (pair, ("--index", tmp_path), "is a folder"),
        (pair, ("--index", out), "one file"),
        (pair, ("--index", reference), "no index of statewide"),
        (pair, ("--out", tmp_path / "near.txt"), "must end in .csv or .parquet"),
    ):
        with pytest.raises(UserError, match=message):
            query(inputs, "--out", out, *options)
        assert [path.name for path in tmp_path.iterdir()] == ["in"], message


def test_what_is_written_comes_whole_or_not_at_all(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*arguments: object) -> None:
        raise UserError("halfway")

    monkeypatch.setattr("launcher.embed_query.count_votes", fail)
    with pytest.raises(UserError, match="halfway"):
        query(pair, "--out", tmp_path / "near.csv", "--label", "kind")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
