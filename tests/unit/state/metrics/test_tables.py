from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp

from state.metrics.errors import EvaluationError
from state.metrics.judged_cells import check_values, scan_cells
from state.metrics.tables import check_names, check_same_names, find_common_genes, group_cells
from tests.support.cell_tables import CONTROL, dense, random_table


def test_groups_are_sorted_with_the_control_last_and_names_without_cells_left_out():
    table = random_table(0)
    table = replace(
        table, label_names=("b", "B", "unused", CONTROL), labels=np.array([0, 3, 1, 1, 0, 3, 3])
    )
    groups = group_cells(table)
    assert groups.names == ("B", "b")
    assert groups.codes_N.tolist() == [1, 2, 0, 0, 1, 2, 2]
    assert groups.sizes.tolist() == [2, 2, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"control": "ntc"}, "'ntc'.*GENE0.*Set the control label"),
        ({"labels": np.full(100, 3)}, "every cell is a control"),
        ({"labels": np.full(100, 9)}, "labels run from 9 to 9"),
        ({"label_names": ("a", "a", "b", CONTROL)}, "not unique"),
    ],
)
def test_labels_that_cannot_be_used(changes, message):
    with pytest.raises(EvaluationError, match=message):
        group_cells(replace(random_table(0), **changes))


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "NaN or infinite"),
        (np.inf, "NaN or infinite"),
        (-0.25, r"negative value \(-0.25\)"),
        (15.0, "the value 15.*take log1p first"),
    ],
)
def test_values_that_cannot_be_used(form, value, message):
    table = random_table(0)
    values = dense(table)
    values[-1, -1] = value
    with pytest.raises(EvaluationError, match=f"the prediction.*{message}"):
        check_values(scan_cells(replace(table, values=form(values))), "the prediction")


def test_counts_are_refused_and_log1p_values_pass():
    table = random_table(0)
    check_values(scan_cells(table), "the truth")
    for values in (np.rint(dense(table)), sp.csr_matrix((100, 30), dtype=np.float32)):
        with pytest.raises(EvaluationError, match="whole numbers only.*log1p first"):
            check_values(scan_cells(replace(table, values=values)), "the truth")


def test_shapes_and_duplicate_genes():
    table = random_table(0)
    with pytest.raises(EvaluationError, match=r"shape \(100, 30\).*29 genes"):
        check_names(replace(table, genes=table.genes[:-1]), "the truth")
    with pytest.raises(EvaluationError, match="genes occur twice: GENE3. "):
        check_names(replace(table, genes=(*table.genes[:-1], "GENE3")), "the truth")


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix, sp.csc_matrix])
def test_a_scan_counts_the_nonzeros_of_perturbed_and_control_cells(form):
    table = random_table(0)
    values = dense(table)
    scan = scan_cells(replace(table, values=form(values)))
    is_control = table.labels == 3
    expected = [(values[~is_control] != 0).sum(axis=0), (values[is_control] != 0).sum(axis=0)]
    np.testing.assert_array_equal(scan.nonzero_2C, expected)
    assert scan.highest == values.max()


def test_common_genes_keep_the_order_of_the_truth():
    real = random_table(0)
    pred = replace(real, genes=("NEW", *real.genes[:0:-1]))
    genes, report = find_common_genes(real, pred)
    assert genes == real.genes[1:]
    assert report.splitlines() == [
        "left out 1 gene(s) that only the truth has: GENE0",
        "left out 1 gene(s) that only the prediction has: NEW",
    ]
    with pytest.raises(EvaluationError, match="no gene in common"):
        find_common_genes(real, replace(real, genes=tuple(f"x{i}" for i in range(30))))


def test_differences_are_named():
    real = random_table(0)
    with pytest.raises(EvaluationError, match=r"lacks 1 gene.*GENE29 and has 1 gene.*: NEW"):
        check_same_names(real, replace(real, genes=(*real.genes[:-1], "NEW")))
    keep = real.labels != 2
    fewer = replace(real, values=real.values[keep], labels=real.labels[keep])
    with pytest.raises(EvaluationError, match="lacks 1 perturbation.*GENE2"):
        check_same_names(real, fewer)
    with pytest.raises(EvaluationError, match="control is 'ctrl'.*'GENE0'"):
        check_same_names(real, replace(real, control="GENE0"))
