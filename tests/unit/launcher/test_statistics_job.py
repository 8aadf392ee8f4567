"""The statistics commands and stages: which files, which words, which pictures."""

import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from data_store.expression_source import CellQuery, open_expression
from data_store.knockdown import KnockdownThresholds
from data_store.preprocess import PreprocessSpec, preprocess
from data_store.schema import ObsColumns, run_in_process
from launcher.cli import main
from launcher.statistics_job import (
    StatisticsFiles,
    name_input,
    write_deltas,
    write_statistics,
)
from tests.support.atlas import write_atlas

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_atlas(tmp_path_factory.mktemp("atlas") / "atlas.h5ad")


def files_in(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_statistics_are_written_and_said(atlas: Path, tmp_path: Path):
    files = StatisticsFiles(tmp_path, "atlas")
    report = write_statistics(open_expression(atlas), files, run_in_process, rows_per_block=100)
    assert files_in(tmp_path) == {
        "atlas_gene_statistics.csv",
        "atlas_summary.txt",
        "plots/atlas_gene_mean_distribution.png",
    }
    table = pd.read_csv(tmp_path / "atlas_gene_statistics.csv")
    assert list(table) == ["gene", "mean", "max", "min", "nonzero_fraction"]
    assert files.summary.read_text() == report.text + "\n"
    wanted = ad.read_h5ad(atlas).X.toarray().mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(table["mean"], wanted)
    assert report.text.splitlines()[-4] == f"Mean of gene means: {wanted.mean():.6g}"
    names = [line.split(":")[0] for line in report.text.splitlines()[-4:]]
    assert names == [
        "Mean of gene means",
        "Mean of gene maxima",
        "Mean of gene minima",
        "Fraction of genes never expressed",
    ]
    assert files.gene_means.read_bytes().startswith(PNG)


def test_deltas_are_the_same_in_both_formats_and_a_knockdown_table_never_outlives_them(
    atlas: Path, tmp_path: Path
):
    files = StatisticsFiles(tmp_path, "atlas")
    expression = open_expression(atlas, CellQuery())
    report = write_deltas(
        expression,
        files,
        run_in_process,
        rows_per_block=100,
        thresholds=KnockdownThresholds(min_cells=5),
    )
    plain = {
        "atlas_deltas.csv",
        "atlas_deltas.parquet",
        "plots/gene_delta_distribution.png",
    }
    assert files_in(tmp_path) == plain | {"atlas_knockdown.csv", "plots/knockdown.png"}
    assert files_in(tmp_path) == {
        str(p.relative_to(tmp_path)) for p in files.of_deltas(knockdown=True)
    }
    from_csv = pd.read_csv(files.deltas_csv, index_col="perturbation", float_precision="round_trip")
    from_parquet = pd.read_parquet(files.deltas_parquet)
    assert from_csv.shape == (8, 60)
    assert from_parquet.index.name == "perturbation"
    pd.testing.assert_frame_equal(from_csv, from_parquet, check_exact=True)
    table = pd.read_csv(files.knockdown)
    assert f"filter: {table['is_kept'].sum()} of 8 perturbations" in report.text
    assert "8 of 8 measured targets go down (0 not measured)" in report.text

    write_deltas(expression, files, run_in_process, rows_per_block=100, thresholds=None)
    assert files_in(tmp_path) == plain


def call(monkeypatch: pytest.MonkeyPatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["statewide", *map(str, arguments)])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as left:
        main()
    return int(str(left.value.code))


def test_kept_cells_make_a_new_atlas(atlas: Path, tmp_path: Path, monkeypatch, capsys):
    kept = tmp_path / "kept.h5ad"
    options = ("--knockdown", "--min-cells", 10, "--residual-cell", 0.4, "--kept-cells", kept)
    assert call(monkeypatch, "deltas", atlas, "--out", tmp_path, *options, "--local") == 0
    table = pd.read_csv(tmp_path / "atlas_knockdown.csv").set_index("perturbation")
    counts = ad.read_h5ad(kept).obs["target_gene"].value_counts()
    assert counts.pop("non-targeting") == 120
    assert table["is_kept"].any()
    assert counts.to_dict() == table.loc[table["is_kept"], "num_kept_cells"].to_dict()
    assert f"kept cells: {kept}" in capsys.readouterr().out
    preprocess(PreprocessSpec(kept, tmp_path / "store", ObsColumns(), None, {}, 20, 100))


def test_the_commands_take_a_store_by_any_name(atlas: Path, tmp_path: Path, monkeypatch, capsys):
    store = tmp_path / "store"
    preprocess(PreprocessSpec(atlas, store, ObsColumns(), None, {}, 20, 100))
    monkeypatch.chdir(store)
    assert call(monkeypatch, "stats", ".", "--out", "../out", "--local") == 0
    assert call(monkeypatch, "deltas", ".", "--out", "../out", "--local") == 0
    assert "X: log-normalised" in capsys.readouterr().out
    assert {"store_gene_statistics.csv", "store_deltas.csv"} <= files_in(tmp_path / "out")


MISTAKES = {
    "keep form": (("stats", "--keep", "batch"), "--keep 'batch' is not of the form COLUMN=VALUE"),
    "keep column": (("stats", "--keep", "batc=batch_0"), "did you mean 'batch'?"),
    "kept cells alone": (("deltas", "--kept-cells", "k.h5ad"), "add --knockdown"),
    "control": (("deltas", "--control", "non-target"), "did you mean 'non-targeting'?"),
    "column": (("deltas", "--pert-col", "gene"), "obs column 'gene'"),
    "library": (("deltas", "--library-size-col", "cell_type"), "library sizes are numbers"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_ends_with_one_message_and_no_file(
    atlas: Path, tmp_path: Path, monkeypatch, capsys, case: str
):
    (command, *options), message = MISTAKES[case]
    out = tmp_path / "out"
    assert call(monkeypatch, command, atlas, "--out", out, "--local", *options) == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 1
    assert message in said
    assert not out.exists()


def test_a_failing_write_leaves_the_old_table(atlas: Path, tmp_path: Path, monkeypatch):
    files = StatisticsFiles(tmp_path, "atlas")
    files.genes.write_text("old")

    def fail(*_args, **_kwargs):
        raise RuntimeError("torn")

    monkeypatch.setattr(pd.DataFrame, "to_csv", fail)
    with pytest.raises(RuntimeError, match="torn"):
        write_statistics(open_expression(atlas), files, run_in_process, rows_per_block=100)
    assert files.genes.read_text() == "old"
    assert files_in(tmp_path) == {"atlas_gene_statistics.csv"}


@pytest.mark.parametrize(
    ("location", "name"),
    [
        (Path("data/atlas.h5ad"), "atlas"),
        (Path("data/{hepg2,k562}_*.h5ad"), "hepg2_k562"),
        (Path("data/parts"), "parts"),
        ("https://example.org/a/atlas.zarr/", "atlas"),
    ],
)
def test_tables_are_named_after_any_input(location: Path | str, name: str):
    assert name_input(location) == name


def test_statistics_of_columns_leave_no_copy(atlas: Path, tmp_path: Path):
    table = ad.read_h5ad(atlas)
    by_row, by_column = tmp_path / "row", tmp_path / "column"
    table.X = table.X.tocsc()
    table.write_h5ad(tmp_path / "csc.h5ad")
    for path, out in ((atlas, by_row), (tmp_path / "csc.h5ad", by_column)):
        files = StatisticsFiles(out, "a")
        write_statistics(open_expression(path), files, run_in_process, rows_per_block=100)
    assert sorted(entry.name for entry in by_column.iterdir()) == sorted(
        entry.name for entry in by_row.iterdir()
    )
    name = "a_gene_statistics.csv"
    pd.testing.assert_frame_equal(pd.read_csv(by_row / name), pd.read_csv(by_column / name))
