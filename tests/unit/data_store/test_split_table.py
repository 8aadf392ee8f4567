import csv

from data_store.split_designs import make_context_splits
from data_store.split_table import (
    ALL_CONTEXTS,
    count_splits,
    format_split_table,
    write_split_table,
)
from data_store.splits import make_random_splits, split_rows
from tests.support.labelled_cells import make_cells


def by_context(cells, drop=()):
    return make_context_splits(
        cells, test_contexts=["rpe1"], val_contexts=["jurkat"], train=0.6, val=0.2, seed=0,
        controls="partition", drop=drop,
    )  # fmt: skip


def test_each_split_and_context_has_a_line_with_its_cells():
    # 10 perturbations x 2 batches x 2 cells, 2 x 6 controls in each context.
    cells = make_cells(contexts=("jurkat", "k562", "rpe1"))
    table = count_splits(cells, by_context(cells))
    assert [tuple(line) for line in table] == [
        ("train", "k562", 10, 40, 12),
        ("train", ALL_CONTEXTS, 10, 40, 12),
        ("val", "jurkat", 10, 40, 12),
        ("val", ALL_CONTEXTS, 10, 40, 12),
        ("test", "rpe1", 10, 40, 12),
        ("test", ALL_CONTEXTS, 10, 40, 12),
    ]


def test_counts_are_those_of_the_rows_and_miss_no_cell():
    cells = make_cells(contexts=("k562", "rpe1"))
    splits = make_random_splits(cells, 0.64, 0.16, 1, "partition", drop=("G3",))
    table = count_splits(cells, splits)
    for split in ("train", "val", "test"):
        pert_rows, control_rows = split_rows(cells, splits, split)
        (total,) = (t for t in table if (t.split, t.context) == (split, ALL_CONTEXTS))
        assert total[2:] == (len(splits.perturbations(split)), pert_rows.size, control_rows.size)
        parts = [t for t in table if t.split == split and t.context != ALL_CONTEXTS]
        assert sum(part.cells for part in parts) == total.cells
    assert [tuple(t) for t in table if t.split == "unused"] == [
        ("unused", "k562", 1, 4, 0),
        ("unused", "rpe1", 1, 4, 0),
        ("unused", ALL_CONTEXTS, 1, 8, 0),
    ]
    totals = [t for t in table if t.context == ALL_CONTEXTS]
    assert sum(t.cells + t.controls for t in totals) == cells.pert_code.size


def test_a_single_context_needs_no_total():
    cells = make_cells(contexts=("k562",))
    table = count_splits(cells, make_random_splits(cells, 0.64, 0.16, 1, "partition"))
    assert [line.split for line in table] == ["train", "val", "test"]


def test_the_table_is_markdown_and_csv(tmp_path):
    cells = make_cells(contexts=("jurkat", "k562", "rpe1"), cells=700)
    table = count_splits(cells, by_context(cells))
    lines = format_split_table(table).splitlines()
    assert len({len(line) for line in lines}) == 1
    fields = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert fields == ["train", "k562", "10", "14,000", "12"]
    assert set(lines[1]) == set("|-: ")
    write_split_table(tmp_path, table)
    assert (tmp_path / "splits.md").read_text() == format_split_table(table) + "\n"
    with (tmp_path / "splits.csv").open(newline="") as handle:
        rows = list(csv.reader(handle))
    assert rows[0] == ["split", "context", "perturbations", "cells", "controls"]
    assert rows[1] == ["train", "k562", "10", "14000", "12"]
