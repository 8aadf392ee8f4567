"""Files in, cell-eval's tables out: layout, hazards, scores, and what is refused."""

from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from data_store.schema import ObsColumns, StoreError, UserError
from launcher import cell_tests
from launcher.evaluate_files import FileEvaluation, evaluate_files, score_files
from state.evaluate import evaluate
from state.metrics.profiles import COLUMNS_OF, Conventions
from tests.support.cell_tables import CONTROL, dense, random_table

DE_COLUMNS = (
    "target,feature,target_mean,ref_mean,target_membership,ref_membership,"
    "log2_fold_change,percent_change,p_value,statistic,fdr"
)


def write(path, table, *, form=sp.csr_matrix, dtype=np.float32, genes=None):
    labels = pd.Categorical(
        np.array(table.label_names)[table.labels], [*table.label_names, "never used"]
    )
    cells = ad.AnnData(
        form(dense(table).astype(dtype)),
        obs=pd.DataFrame({"gene": labels}, index=np.arange(len(labels)).astype(str)),
        var=pd.DataFrame(index=list(genes or table.genes)),
    )
    cells.write_h5ad(path)
    return path


@pytest.fixture
def options(tmp_path):
    return FileEvaluation(
        real=write(tmp_path / "real.h5ad", random_table(0)),
        pred=write(tmp_path / "pred.h5ad", random_table(1)),
        out=tmp_path / "out",
        columns=ObsColumns(pert_col="gene", control_pert=CONTROL),
        conventions=Conventions(profile="full"),
    )


def read(options, name):
    return pd.read_csv(options.out / name)


def test_tables_have_the_layout_of_cell_eval(options):
    answer = evaluate_files(replace(options, baseline="cell_mean"))
    results, summary = read(options, "results.csv"), read(options, "agg_results.csv")
    assert list(results.columns) == ["perturbation", *COLUMNS_OF["full"]]
    assert results["perturbation"].tolist() == ["GENE0", "GENE1", "GENE2"]
    assert list(summary.columns) == ["statistic", *COLUMNS_OF["full"]]
    assert summary["statistic"].tolist()[:3] == ["count", "null_count", "mean"]
    for side in ("real", "pred"):
        lines = (options.out / f"{side}_de.csv").read_text().splitlines()
        assert lines[0] == DE_COLUMNS
        assert len(lines) == 1 + 3 * 30
        assert lines[1].startswith("GENE0,GENE0,0,")
    scores = read(options, "score.csv").set_index("metric")["from_baseline"]
    assert scores["mae"] == pytest.approx(
        max(0, 1 - summary["mae"][2] / read(options, "baseline_agg_results.csv")["mae"][2])
    )
    assert f"100 x avg_score {100 * scores['avg_score']:.2f}" in answer
    for path in options.out.glob("*.csv"):
        frame = pd.read_parquet(path.with_suffix(".parquet"))
        assert list(frame.columns) == list(pd.read_csv(path).columns)
    assert not list(options.out.glob("*.partial"))


def test_a_perturbation_without_true_genes_is_empty_and_nan_is_not(options):
    strict = replace(options.conventions, fdr=1e-30)
    evaluate_files(replace(options, conventions=strict))
    header, first = (options.out / "results.csv").read_text().splitlines()[:2]
    row = dict(zip(header.split(","), first.split(","), strict=True))
    assert row["de_direction_match"] == ""
    assert row["roc_auc"] == "nan"
    assert row["overlap_at_N"] == "0"


@pytest.mark.parametrize(("form", "dtype"), [(sp.csc_matrix, np.float32), (np.asarray, np.float64)])
def test_form_and_order_do_not_matter(options, tmp_path, form, dtype):
    evaluate_files(options)
    expected = read(options, "results.csv")
    table = random_table(1)
    order = np.random.default_rng(0).permutation(30)
    shuffled = replace(
        table, values=dense(table)[:, order], genes=tuple(table.genes[gene] for gene in order)
    )
    other = replace(
        options,
        pred=write(tmp_path / "other.h5ad", shuffled, form=form, dtype=dtype),
        out=tmp_path / "other",
    )
    evaluate_files(other)
    pd.testing.assert_frame_equal(read(other, "results.csv"), expected, rtol=1e-9)


def test_explicit_zeros_do_not_matter(options, tmp_path):
    evaluate_files(options)
    cells = ad.read_h5ad(options.pred)
    zeros = cells.X.tocoo()
    empty = np.argwhere(cells.X.toarray() == 0)[:50]
    cells.X = sp.csr_matrix(
        (
            np.append(zeros.data, np.zeros(50, np.float32)),
            (np.append(zeros.row, empty[:, 0]), np.append(zeros.col, empty[:, 1])),
        ),
        shape=zeros.shape,
    )
    assert (cells.X.data == 0).sum() == 50
    cells.write_h5ad(tmp_path / "zeros.h5ad")
    other = replace(options, pred=tmp_path / "zeros.h5ad", out=tmp_path / "zeros")
    evaluate_files(other)
    pd.testing.assert_frame_equal(read(other, "results.csv"), read(options, "results.csv"))


def test_missing_genes_are_named_or_left_out(options, tmp_path):
    renamed = [f"GENE{i}" for i in range(29)] + ["OTHER"]
    path = write(tmp_path / "renamed.h5ad", random_table(1), genes=renamed)
    with pytest.raises(UserError, match=r"lacks 1 gene.*GENE29.*OTHER.*--common-genes"):
        evaluate_files(replace(options, pred=path))
    assert not options.out.exists()
    answer = evaluate_files(replace(options, pred=path, common_genes=True))
    assert "only the truth has: GENE29" in answer
    assert "only the prediction has: OTHER" in answer
    assert len(read(options, "real_de.csv")) == 3 * 29


def test_what_cannot_be_judged_is_refused(options, tmp_path):
    negative = replace(random_table(1), values=dense(random_table(1)) - np.float32(0.5))
    with pytest.raises(UserError, match="Clip the prediction"):
        evaluate_files(replace(options, pred=write(tmp_path / "negative.h5ad", negative)))
    with pytest.raises(UserError, match="'nothing' is neither a file nor 'cell_mean'"):
        evaluate_files(replace(options, baseline="nothing"))


def rewrite(path, out, change):
    cells = ad.read_h5ad(path)
    changed = change(cells)
    (cells if changed is None else changed).write_h5ad(out)
    return out


def put_nan(cells):
    cells.X.data[3] = np.nan


def make_counts(cells):
    cells.X.data = np.ceil(cells.X.data)


def drop_controls(cells):
    return cells[cells.obs["gene"] != CONTROL].copy()


def keep_controls(cells):
    return cells[cells.obs["gene"] == CONTROL].copy()


def drop_perturbation(cells):
    return cells[cells.obs["gene"] != "GENE1"].copy()


def rename_column(cells):
    cells.obs = cells.obs.rename(columns={"gene": "guide"})


def drop_a_label(cells):
    cells.obs["gene"] = cells.obs["gene"].where(np.arange(cells.n_obs) != 4)


def drop_cells(cells):
    return cells[:0].copy()


def repeat_a_gene(cells):
    cells.var_names = ["GENE0", "GENE0", *cells.var_names[2:]]


@pytest.mark.filterwarnings("ignore:Variable names are not unique:UserWarning")
@pytest.mark.parametrize("side", ["real", "pred"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put_nan, r"changed\.h5ad\) holds NaN or infinite"),
        (make_counts, r"changed\.h5ad\) holds whole numbers only"),
        (drop_controls, r"no cell of .*changed\.h5ad has the control label 'ctrl'.*GENE0"),
        (keep_controls, "every cell is a control"),
        (drop_perturbation, r"1 perturbation.*GENE1"),
        (rename_column, r"'gene' \(pert_col\) is not in .*changed\.h5ad.*guide"),
        (drop_a_label, "1 of 100 cells have no value in obs column 'gene'"),
        (drop_cells, r"changed\.h5ad is empty"),
        (repeat_a_gene, "gene names more than once"),
    ],
)
def test_files_that_cannot_be_judged_are_named_and_nothing_is_written(
    options, tmp_path, side, change, message
):
    path = rewrite(getattr(options, side), tmp_path / "changed.h5ad", change)
    with pytest.raises(UserError, match=message):
        evaluate_files(replace(options, **{side: path}, baseline="cell_mean"))
    assert not options.out.exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"real.h5ad", "pred.h5ad", "changed.h5ad"}


@pytest.mark.filterwarnings("ignore:Writing zarr v2 data will no longer:UserWarning")
def test_zarr_half_precision_and_groups_of_one_cell(options, tmp_path):
    cells = ad.read_h5ad(options.pred)
    first = np.flatnonzero(cells.obs["gene"] == "GENE2")[1:]
    cells = cells[np.setdiff1d(np.arange(cells.n_obs), first)].copy()
    cells.X = cells.X.toarray().astype(np.float16)
    cells.write_zarr(tmp_path / "pred.zarr")
    evaluate_files(replace(options, pred=tmp_path / "pred.zarr"))
    table = read(options, "pred_de.csv")
    assert table.query("target == 'GENE2'")["target_membership"].tolist() == [1] * 30
    assert table["p_value"].between(0, 1).all()


def test_a_file_gives_what_the_table_in_memory_gives(options):
    tables = (random_table(0), random_table(1))
    for control in ("own", "real"):
        conventions = replace(options.conventions, control=control)
        evaluate_files(replace(options, conventions=conventions))
        expected = evaluate(*tables, conventions=conventions).per_perturbation
        results = read(options, "results.csv")
        pd.testing.assert_frame_equal(
            results, expected[results.columns], check_dtype=False, rtol=1e-9
        )


def test_the_truth_is_tested_once(options, tmp_path, monkeypatch):
    cached = replace(options, cache=tmp_path / "cache")
    evaluate_files(cached)
    expected = read(options, "results.csv")
    sides = []
    judge = cell_tests.judge_side
    monkeypatch.setattr(
        "launcher.evaluate_files.judge_side",
        lambda cells, *rest: sides.append(cells) or judge(cells, *rest),
    )
    evaluate_files(cached)
    assert len(sides) == 1
    pd.testing.assert_frame_equal(read(options, "results.csv"), expected)
    evaluate_files(replace(cached, conventions=replace(options.conventions, method="t-test")))
    write(options.real, random_table(2))
    evaluate_files(cached)
    assert len(sides) == 5
    assert len(list(cached.cache.iterdir())) == 3


def test_an_interrupted_evaluation_leaves_what_was_there(options, monkeypatch):
    evaluate_files(options)
    before = {path.name: path.read_bytes() for path in options.out.iterdir()}
    write(options.pred, random_table(5))
    monkeypatch.setattr("launcher.evaluate_files._write_evaluation", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate_files(options)
    assert {path.name: path.read_bytes() for path in options.out.iterdir()} == before
    assert not list(options.out.parent.glob(".*partial"))


def test_scores_of_two_files(options, tmp_path):
    evaluate_files(replace(options, baseline="cell_mean"))
    summaries = [options.out / f"{name}agg_results.csv" for name in ("", "baseline_")]
    text = score_files(*summaries, tmp_path / "score.csv")
    assert "avg_score" in text
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "score.csv"), read(options, "score.csv"), rtol=1e-9
    )
    with pytest.raises(UserError, match=r"absent\.csv cannot be read"):
        score_files(tmp_path / "absent.csv", summaries[1], None)


def test_a_challenge_archive_holds_the_cells_in_the_order_of_the_challenge(options, tmp_path):
    from data_store.challenge import write_challenge_archive

    zstandard = pytest.importorskip("zstandard")
    import tarfile

    genes = tmp_path / "genes.csv"
    genes.write_text("\n".join(f"GENE{i}" for i in reversed(range(30))) + "\n")
    out = tmp_path / "pred.vcc"
    write_challenge_archive(options.pred, genes, out, options.columns, max_cells=100)
    with tarfile.open(out) as archive:
        assert archive.getnames() == ["watermark.txt", "pred.h5ad.zst"]
        assert archive.extractfile("watermark.txt").read() == b"vcc-prep"
        packed = archive.extractfile("pred.h5ad.zst").read()
    (tmp_path / "unpacked.h5ad").write_bytes(zstandard.ZstdDecompressor().decompress(packed))
    cells, before = ad.read_h5ad(tmp_path / "unpacked.h5ad"), ad.read_h5ad(options.pred)
    assert list(cells.var_names) == genes.read_text().split()
    assert (cells[:, before.var_names].X != before.X).nnz == 0
    assert cells.obs["target_gene"].tolist() == before.obs["gene"].tolist()


def test_an_archive_that_the_challenge_would_refuse_is_not_written(options, tmp_path):
    from data_store.challenge import write_challenge_archive

    genes, out = tmp_path / "genes.csv", tmp_path / "pred.vcc"
    genes.write_bytes(b"\x89PNG")
    with pytest.raises(StoreError, match="cannot be read as text: .* Give the challenge's list"):
        write_challenge_archive(options.pred, genes, out, options.columns, max_cells=100)
    genes.write_text("\n".join(f"GENE{i}" for i in range(29)))
    with pytest.raises(StoreError, match=r"has 1 genes that .* lacks, such as 'GENE29'"):
        write_challenge_archive(options.pred, genes, out, options.columns, max_cells=100)
    genes.write_text("\n".join(f"GENE{i}" for i in range(30)))
    with pytest.raises(StoreError, match="100 cells, but the challenge takes at most 99"):
        write_challenge_archive(options.pred, genes, out, options.columns, max_cells=99)
    assert not out.exists()
