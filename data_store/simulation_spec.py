"""What can be asked of the simulator, checked: ``SimulationSpec``, and the files it may name."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from data_store.calibration import CALIBRATIONS, Calibration, CalibrationName
from data_store.hints import nearest, some
from data_store.schema import ObsColumns, StoreError

CountType: TypeAlias = Literal["float32", "uint16"]
CellCounts: TypeAlias = tuple[tuple[str, int], ...]

MIN_CELLS_PER_PERT = 3
CONTROL_LABEL = ObsColumns().control_pert
# Part of what a seed means, so not a setting.
_MODEL_VERSION = 1
# Newer than version 1 and neutral by default: an atlas without them is what it always was.
_ADDED = ("calibration", "depth", "count_type", "gene_names", "cell_counts")


@dataclass(frozen=True, kw_only=True)
class SimulationSpec:
    """What to simulate. The same spec gives the same atlas, byte for byte.

    Raises
    ------
    StoreError
        When there are more perturbations than genes, too few cells, or names and counts that do
        not agree with the sizes.
    """

    num_cells: int
    """N, controls included."""
    num_genes: int
    """G."""
    num_perturbations: int
    """P; every perturbation is named after the gene it knocks down."""
    num_batches: int = 2
    """Experimental batches, each with its own shift of expression."""
    num_contexts: int = 1
    """Cell lines, each with its own baseline; effects are the same in all."""
    control_fraction: float = 0.2
    """Share of the cells that are controls; ``cell_counts`` replaces it."""
    feature_dim: int = 32
    """D, width of the perturbation features; a quarter of the columns says nothing."""
    effect_size: float = 1.0
    """Scale of all log fold changes, knock-downs included."""
    seed: int = 0
    """Seed of everything."""
    calibration: CalibrationName = "plain"
    """Which numbers describe expression and its variation."""
    depth: float = 1.0
    """Scale of all expected counts: 0.1 is the same atlas sequenced to a tenth."""
    count_type: CountType = "float32"
    """Type of the counts in the file."""
    gene_names: tuple[str, ...] | None = None
    """G names; None: invented ones."""
    cell_counts: CellCounts | None = None
    """Cells of each label, the control's among them; None: drawn."""

    def __post_init__(self) -> None:
        if self.num_perturbations > self.num_genes:
            raise StoreError(
                f"simulate.num_perturbations = {self.num_perturbations} is more than "
                f"simulate.num_genes = {self.num_genes}: every perturbation knocks down a gene of "
                f"its own. Set num_perturbations to at most {self.num_genes}, or add genes"
            )
        self._check_names()
        self._check_counts()
        strata = self.num_batches * self.num_contexts
        if self.num_controls < strata:
            raise StoreError(
                f"simulate.num_cells = {self.num_cells} with control_fraction = "
                f"{self.control_fraction:g} gives {self.num_controls} control cells, fewer than "
                f"the {strata} pairs of a batch and a context, which need one each. Raise "
                "num_cells or control_fraction"
            )
        needed = MIN_CELLS_PER_PERT * self.num_perturbations
        if self.num_cells - self.num_controls < needed:
            raise StoreError(
                f"simulate.num_cells = {self.num_cells} leaves "
                f"{self.num_cells - self.num_controls} cells for {self.num_perturbations} "
                f"perturbations, which need {MIN_CELLS_PER_PERT} each: {needed}. Raise num_cells, "
                "or lower num_perturbations or control_fraction"
            )

    def _check_names(self) -> None:
        if self.gene_names is not None and len(self.gene_names) != self.num_genes:
            raise StoreError(
                f"simulate.num_genes = {self.num_genes}, but simulate.gene_names lists "
                f"{len(self.gene_names)}: set num_genes (or --genes) to {len(self.gene_names)}"
            )

    def _check_counts(self) -> None:
        if self.cell_counts is None:
            return
        targets = [label for label, _ in self.cell_counts if label != CONTROL_LABEL]
        if len(targets) != self.num_perturbations:
            raise StoreError(
                f"simulate.num_perturbations = {self.num_perturbations}, but "
                f"simulate.cells_per_perturbation lists {len(targets)}: set num_perturbations "
                f"(or --perturbations) to {len(targets)}"
            )
        known = set(self.genes)
        unknown = [label for label in targets if label not in known]
        if unknown:
            raise StoreError(
                f"simulate.cells_per_perturbation names {some(unknown)}, which is not among the "
                f"genes{nearest(unknown[0], self.genes)} Give the genes' names with "
                "simulate.gene_names (or --gene-names)"
            )

    @property
    def num_controls(self) -> int:
        """Control cells."""
        if self.cell_counts is not None:
            return dict(self.cell_counts)[CONTROL_LABEL]
        return round(self.num_cells * self.control_fraction)

    @cached_property
    def genes(self) -> tuple[str, ...]:
        """Names of the genes: as given, or G00000, G00001, ..."""
        return self.gene_names or tuple(f"G{gene:05d}" for gene in range(self.num_genes))

    @property
    def numbers(self) -> Calibration:
        """The numbers behind ``calibration``."""
        return CALIBRATIONS[self.calibration]

    def describe(self) -> dict[str, Any]:
        """Return what the atlas depends on, as JSON holds it; names and counts as digests."""
        described: dict[str, Any] = {"model_version": _MODEL_VERSION, **asdict(self)}
        for field in fields(self):
            if field.name in _ADDED and described[field.name] == field.default:
                del described[field.name]
        for name in ("gene_names", "cell_counts"):
            if name in described:
                text = json.dumps(described[name])
                described[name] = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
        return described


def read_gene_names(path: Path) -> tuple[str, ...]:
    """Read gene names, one a line: the first column of a CSV without a header.

    Raises
    ------
    StoreError
        If the file cannot be read, or a name is empty or there twice.
    """
    names = [row[0].strip() if row else "" for row in _read_rows(path)]
    empty = [number for number, name in enumerate(names, start=1) if not name]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if not names or empty:
        raise StoreError(
            f"{path} (simulate.gene_names) has no name in line {empty[0] if empty else 1}: "
            "it must hold one gene name a line"
        )
    if CONTROL_LABEL in names:
        raise StoreError(
            f"{path} (simulate.gene_names) holds {CONTROL_LABEL!r}, which labels the control: "
            "rename that gene"
        )
    if twice:
        raise StoreError(f"{path} (simulate.gene_names) holds {some(twice)} more than once")
    return tuple(names)


def read_cell_counts(path: Path, num_cells: int) -> CellCounts:
    """Read cells per label from a CSV with the columns ``target_gene`` and ``n_cells``.

    Parameters
    ----------
    path
        The CSV; the control is labelled ``non-targeting``.
    num_cells
        Cells wanted in all. Where the file's sum is another, its counts are scaled to it, at
        least 3 a label.

    Raises
    ------
    StoreError
        If the file cannot be read, lacks a column or the control, has a label twice or a count
        that is no number; or ``num_cells`` is too few.
    """
    where = f"{path} (simulate.cells_per_perturbation)"
    rows = _read_rows(path)
    header = [name.strip() for name in rows[0]] if rows else []
    if not {"target_gene", "n_cells"} <= set(header):
        raise StoreError(
            f"{where} must have the columns target_gene and n_cells; it has {some(header)}"
        )
    label_at, count_at = header.index("target_gene"), header.index("n_cells")
    counts: dict[str, int] = {}
    for number, row in enumerate(rows[1:], start=2):
        label = row[label_at].strip() if len(row) > label_at else ""
        text = row[count_at].strip() if len(row) > count_at else ""
        if not label or label in counts or not text.isdecimal() or int(text) < 1:
            raise StoreError(
                f"{where}, line {number}: {','.join(row)!r} must be a label that is there once, "
                "and a whole number of at least 1"
            )
        counts[label] = int(text)
    if CONTROL_LABEL not in counts:
        raise StoreError(f"{where} has no row for the control, {CONTROL_LABEL!r}")
    return tuple(zip(counts, _scale(list(counts.values()), num_cells, where), strict=True))


def _scale(counts: list[int], total: int, where: str) -> list[int]:
    """Scale counts to a total by largest remainders, with the least that a label needs."""
    if total == sum(counts) and min(counts) >= MIN_CELLS_PER_PERT:
        return counts
    needed = MIN_CELLS_PER_PERT * len(counts)
    if total < needed:
        raise StoreError(
            f"simulate.num_cells = {total} is too few for the {len(counts)} labels of {where}, "
            f"which need {MIN_CELLS_PER_PERT} each: {needed}"
        )
    ideal = np.array(counts) / sum(counts) * total
    scaled = np.maximum(np.floor(ideal).astype(np.int64), MIN_CELLS_PER_PERT)
    while scaled.sum() < total:
        scaled[np.argmax(ideal - scaled)] += 1
    while scaled.sum() > total:
        # What the small ones got more than their share comes from the largest.
        scaled[np.argmax(scaled)] -= 1
    return [int(count) for count in scaled]


def _read_rows(path: Path) -> list[list[str]]:
    try:
        with path.open(encoding="utf-8", newline="") as handle:
            return list(csv.reader(handle))
    except FileNotFoundError:
        raise StoreError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise StoreError(f"{path} cannot be read as CSV: {error}") from None
