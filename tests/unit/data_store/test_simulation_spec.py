import hashlib
from dataclasses import replace

import anndata as ad
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_store.atlas_model import (
    build_model,
    compress_rows,
    cut_blocks,
    draw_counts,
    plan_cells,
)
from data_store.schema import StoreError
from data_store.simulate import simulate_atlas
from data_store.simulation_spec import SimulationSpec, read_cell_counts, read_gene_names

PLAIN = SimulationSpec(num_cells=400, num_genes=50, num_perturbations=4, feature_dim=8, seed=3)
NAMES = tuple(f"GENE{number}" for number in range(50))
COUNTS = (("GENE7", 50), ("non-targeting", 250), ("GENE3", 90), ("GENE49", 7), ("GENE11", 3))
NAMED = replace(PLAIN, gene_names=NAMES, cell_counts=COUNTS)


def write(path, text):
    path.write_text(text)
    return path


def draw(spec):
    (block,) = cut_blocks(plan_cells(spec), spec.num_cells)
    return draw_counts(block, model=build_model(spec), seed=spec.seed)


def test_a_spec_without_the_newer_keys_is_what_it_always_was():
    assert "depth" not in PLAIN.describe()
    assert replace(PLAIN, depth=0.5).describe()["depth"] == 0.5
    digest = hashlib.sha256()
    for part in (draw(PLAIN).data, draw(PLAIN).indices):
        digest.update(part.tobytes())
    assert digest.hexdigest().startswith("146a71f26c417cc9")


def test_given_names_and_counts_are_in_the_file(tmp_path):
    simulate_atlas(NAMED, tmp_path / "atlas.h5ad")
    atlas = ad.read_h5ad(tmp_path / "atlas.h5ad")
    assert tuple(atlas.var_names) == NAMES
    assert atlas.obs["target_gene"].value_counts().to_dict() == dict(COUNTS)
    # Said briefly, and other names are another simulation.
    assert NAMED.describe()["gene_names"].startswith("sha256:")
    other = replace(NAMED, gene_names=(*NAMES[:-2], "X", "GENE49"))
    with pytest.raises(StoreError, match="gene_names = sha256:.* there"):
        simulate_atlas(other, tmp_path / "atlas.h5ad")


def test_named_targets_are_expressed_and_the_law_of_genes_is_kept():
    named, plain = build_model(NAMED), build_model(PLAIN)
    assert named.target_P.tolist() == [3, 7, 11, 49]
    assert sorted(named.log_mean_G) == sorted(plain.log_mean_G)
    assert (named.log_mean_G[named.target_P] >= np.median(named.log_mean_G)).all()
    assert sorted(named.log_mean_G[named.target_P]) == sorted(plain.log_mean_G[plain.target_P])


def test_depth_scales_counts():
    shallow = draw(replace(PLAIN, depth=0.1))
    assert shallow.sum() == pytest.approx(draw(PLAIN).sum() / 10, rel=0.05)
    assert shallow.nnz < 0.5 * draw(PLAIN).nnz


def test_dropout_loses_counts_where_few_are_expected():
    spec = replace(PLAIN, num_cells=2000, calibration="vcc")
    model = build_model(spec)
    (block,) = cut_blocks(plan_cells(spec), 2000)
    drawn = draw_counts(block, model=model, seed=0).toarray()
    numbers = replace(model.numbers, dropout_mid=0.0)
    whole = draw_counts(block, model=replace(model, numbers=numbers), seed=0).toarray()
    assert (drawn <= whole).all()
    assert ((drawn == whole) | (drawn == 0)).all()
    mean = whole.mean(0)
    lost = 1 - drawn.sum(0) / np.maximum(whole.sum(0), 1)
    seen = whole.sum(0) > 50
    assert lost[seen & (mean < 0.1)].mean() > 0.03
    assert lost[mean > 3].max() < 0.001


def test_a_count_that_does_not_fit_its_type_is_refused():
    with pytest.raises(StoreError, match="count_type = 'uint16' cannot hold a count of"):
        draw(replace(PLAIN, depth=1e5, count_type="uint16"))


@given(st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), max_size=6))
def test_rows_are_compressed_as_scipy_does(rows):
    counts = np.array(rows, dtype=np.int64).reshape(-1, 5)
    matrix = compress_rows(counts, np.uint16)
    assert matrix.dtype == np.uint16
    assert matrix.has_canonical_format
    assert np.array_equal(matrix.toarray(), counts)


@given(
    counts=st.lists(st.integers(1, 5000), min_size=1, max_size=20),
    total=st.integers(63, 10_000),
)
def test_counts_are_scaled_to_any_total(tmp_path_factory, counts, total):
    path = tmp_path_factory.getbasetemp() / "counts.csv"
    labels = ["non-targeting", *(f"G{number}" for number in range(len(counts) - 1))]
    lines = [f"{label},{count}" for label, count in zip(labels, counts, strict=True)]
    write(path, "\n".join(["target_gene,n_cells", *lines]))
    scaled = dict(read_cell_counts(path, total))
    assert list(scaled) == labels
    assert sum(scaled.values()) == total
    assert min(scaled.values()) >= 3
    ideal = [total * count / sum(counts) for count in counts]
    if min(ideal) >= 3:
        assert all(abs(scaled[label] - i) < 1 for label, i in zip(labels, ideal, strict=True))
    if min(counts) >= 3:
        exact = read_cell_counts(path, sum(counts))
        assert [count for _, count in exact] == counts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gene,n\nA,3\n", "must have the columns target_gene and n_cells; it has gene, n"),
        ("", r"must have the columns .* it has \(none\)"),
        ("target_gene,n_cells\nA,3\n", "no row for the control, 'non-targeting'"),
        ("target_gene,n_cells\nA,3\nA,4\n", "line 3: 'A,4' must be a label that is there once"),
        ("target_gene,n_cells\nA,-3\n", "line 2: 'A,-3'"),
        ("target_gene,n_cells\nA\n", "line 2: 'A'"),
        ("target_gene,n_cells\nA,3\nnon-targeting,9\n", "num_cells = 5 is too few for the 2"),
    ],
)
def test_wrong_count_files_are_refused(tmp_path, text, message):
    path = write(tmp_path / "counts.csv", text)
    with pytest.raises(StoreError, match=f"counts.csv.*{message}|{message}.*counts.csv"):
        read_cell_counts(path, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A\n\nB\n", "no name in line 2"),
        ("", "no name in line 1"),
        ("A\nB\nA\n", "holds A more than once"),
        ("A\nnon-targeting\n", "'non-targeting', which labels the control"),
    ],
)
def test_wrong_name_files_are_refused(tmp_path, text, message):
    with pytest.raises(StoreError, match=f"names.csv.*{message}"):
        read_gene_names(write(tmp_path / "names.csv", text))


def test_missing_and_binary_files_are_refused(tmp_path):
    with pytest.raises(StoreError, match=r"absent\.csv does not exist"):
        read_gene_names(tmp_path / "absent.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(StoreError, match=r"binary\.csv cannot be read as CSV"):
        read_cell_counts(tmp_path / "binary.csv", 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_genes": 60}, "num_genes = 60, but simulate.gene_names lists 50.*to 50"),
        ({"num_perturbations": 5}, "num_perturbations = 5, but .* lists 4.*to 4"),
        ({"gene_names": None}, "names GENE7.* among the genes.*--gene-names"),
    ],
)
def test_names_and_counts_must_agree_with_the_sizes(change, message):
    with pytest.raises(StoreError, match=message):
        replace(NAMED, **change)
