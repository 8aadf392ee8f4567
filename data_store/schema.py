"""Types that cross package borders: what a batch is, what a table of cells is, how errors look.

This is the lowest level of the import order: it imports nothing of ours, and ``state`` may
import it alone from ``data_store``. Shape legend: B cell sets, S cells in a set, G genes (or the
width of an embedding), J genes an embedding is decoded to, N cells, P perturbations, D feature
width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

SplitName: TypeAlias = Literal["train", "val", "test"]
SPLIT_NAMES: tuple[SplitName, ...] = ("train", "val", "test")

OutputSpace: TypeAlias = Literal["hvg", "all"]
"""Genes that a cell is given in: the highly variable ones, or all."""
CellSpace: TypeAlias = Literal["hvg", "all", "embedding"]
"""What a cell is given in: genes, or the embedding that the store holds."""

InputPath: TypeAlias = Path | str
"""A file, folder or glob (``Path``), or a URL that fsspec opens (``str``)."""
GeneChoice: TypeAlias = Literal["same", "intersection", "union"]
HvgFlavor: TypeAlias = Literal["seurat", "cell_ranger", "seurat_v3", "seurat_v3_paper"]
"""How highly variable genes are ranked, under scanpy's names."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class UserError(ValueError):
    """A mistake the user can mend. The command line prints its text and exits with code 2.

    The text names the value, what is allowed, the file and key, and the next step.
    """


class StoreError(UserError):
    """An input file, a store or a split that cannot be used as asked."""


@dataclass(frozen=True)
class ObsColumns:
    """Names of the ``obs`` columns that describe a cell, under the reference's keys."""

    pert_col: str | None = "target_gene"
    """Column with the perturbed gene of each cell; None: no cell is perturbed, all are controls."""
    control_pert: str = "non-targeting"
    """Label in ``pert_col`` that marks control cells."""
    cell_type_key: str | None = None
    """Column with the context (cell type or line); None: all cells share one context."""
    batch_col: str | None = None
    """Column with the experimental batch; None: all cells share one batch."""


class CellCounts(NamedTuple):
    """Expression of B sets of S slots as counts, to be made dense on the device that wants it.

    Slots follow each other, and an empty one has no counts. Each value is a lookup, so a device
    has the same bits as the host that wrote the table. K counts in all, L levels.
    """

    counts_K: npt.NDArray[Any]
    """Raw counts, the store's unsigned type."""
    genes_K: npt.NDArray[Any]
    """Gene of each count, uint16 or int32; ascending within a slot, without repetition."""
    nnz_BS: npt.NDArray[np.int64]
    """Counts in each slot."""
    log1p_BSL: npt.NDArray[np.float32]
    """What a count below L becomes in each slot: log1p of the normalised count."""
    large_place_M: npt.NDArray[np.int64]
    """Where counts of L or more lie in the flattened [B, S, G]."""
    large_value_M: npt.NDArray[np.float32]
    """What they become."""
    num_genes: int
    """G."""

    @property
    def nbytes(self) -> int:
        """Bytes that move to the device."""
        return sum(part.nbytes for part in self if isinstance(part, np.ndarray))


CellValues: TypeAlias = npt.NDArray[np.float32] | CellCounts
"""Log-normalised expression [B, S, G], dense or still to be made dense."""


NO_GENES: npt.NDArray[np.float32] = np.empty((0, 0, 0), dtype=np.float32)


class CellBatch(NamedTuple):
    """A micro-batch of B cell sets of S slots each. Empty slots are zero and masked."""

    control_BSG: CellValues
    """Control cells, one paired with each target cell (same context, same batch if so asked)."""
    target_BSG: CellValues
    """Perturbed cells, the truth."""
    mask_BS: npt.NDArray[np.bool_]
    """True where a slot holds a cell. At least one per set."""
    pert_B: npt.NDArray[np.int64]
    """Index of the set's perturbation in ``Store.perturbations``: one row a set."""
    context_B: npt.NDArray[np.int64]
    """Index of the set's context in ``Store.contexts``."""
    batch_BS: npt.NDArray[np.int64]
    """Index of each cell's experimental batch in ``Store.batches``; 0 in empty slots."""
    genes_BSJ: CellValues = NO_GENES
    """Expression of the target cells, where these are an embedding that is decoded to genes."""

    @property
    def sizes_B(self) -> npt.NDArray[np.int64]:
        """Cells of each set."""
        sizes_B: npt.NDArray[np.int64] = self.mask_BS.sum(axis=1)
        return sizes_B

    def arrays(self) -> tuple[CellValues | npt.NDArray[Any], ...]:
        """Return what ``state.losses.SetObjective.forward`` takes, in its order."""
        cells = (self.control_BSG, self.target_BSG, self.mask_BS)
        return *cells, self.pert_B, self.batch_BS, self.genes_BSJ


ExpressionValues: TypeAlias = sp.csr_matrix | npt.NDArray[np.float32]


class CellBlock(NamedTuple):
    """Some cells of a ``CellSource`` on some of the genes that were asked for."""

    first_cell: int
    """Row of the source that is the block's first; n rows follow."""
    values: Any
    """[n, C] expression: CSR, CSC or dense."""
    places_C: npt.NDArray[np.int32]
    """[C] which of the asked genes each column is, counted in the order asked for; -1: none."""


class CellSource(Protocol):
    """Log-normalised expression of labelled cells, which need not fit into memory."""

    @property
    def genes(self) -> tuple[str, ...]:
        """Gene names, length G."""
        ...

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """[N] index of each cell's perturbation in ``label_names``; -1: it takes no part."""
        ...

    @property
    def label_names(self) -> tuple[str, ...]:
        """Perturbation names, control included."""
        ...

    @property
    def control(self) -> str:
        """The name in ``label_names`` that marks control cells."""
        ...

    def iterate_columns(self, columns: npt.NDArray[np.int64]) -> Iterator[CellBlock]:
        """Yield blocks that together hold each cell's value of each asked gene once."""
        ...

    def read_rows(self, rows: npt.NDArray[np.int64]) -> ExpressionValues:
        """Return [n, G] float32 values of some cells, in the order asked for."""
        ...


@dataclass(frozen=True)
class CellTable:
    """Log-normalised expression of labelled cells in memory: a ``CellSource``."""

    values: ExpressionValues
    """[N, G] log1p expression; CSR or dense float32."""
    genes: tuple[str, ...]
    """Gene names, length G."""
    labels: npt.NDArray[np.int64]
    """[N] index of each cell's perturbation in ``label_names``."""
    label_names: tuple[str, ...]
    """Perturbation names, control included."""
    control: str
    """The name in ``label_names`` that marks control cells."""

    def iterate_columns(self, columns: npt.NDArray[np.int64]) -> Iterator[CellBlock]:
        """Yield one block with all cells."""
        if sp.issparse(self.values):
            places_C = np.full(len(self.genes), -1, dtype=np.int32)
            places_C[columns] = np.arange(len(columns))
            yield CellBlock(0, self.values, places_C)
        else:
            places_C = np.arange(len(columns), dtype=np.int32)
            yield CellBlock(0, self.values[:, columns], places_C)

    def read_rows(self, rows: npt.NDArray[np.int64]) -> ExpressionValues:
        """Return [n, G] values of some cells."""
        return self.values[rows]


@dataclass(frozen=True)
class PerturbationProfiles:
    """Mean expression of each perturbation in a split: what a simple baseline learns from."""

    names: tuple[str, ...]
    """Perturbation names, control excluded, length P."""
    mean_PG: npt.NDArray[np.float64]
    """[P, G] mean of the log1p values over the cells of each perturbation."""
    num_cells_P: npt.NDArray[np.int64]
    """[P] cells behind each mean."""
    control_mean_G: npt.NDArray[np.float64]
    """[G] mean of the log1p values over the split's control cells."""
    features_PD: npt.NDArray[np.float32]
    """[P, D] perturbation features."""
    matched_control_PG: npt.NDArray[np.float64]
    """[P, G] mean of the control cells of the same contexts (and batches) as each perturbation's
    cells, in the same shares: what its mean is compared with."""


@dataclass(frozen=True)
class ControlCells:
    """Control cells paired with the cells to predict (same context, same batch if so asked)."""

    values_NG: npt.NDArray[np.float32]
    """[N, G] log1p expression."""
    library_size_N: npt.NDArray[np.float64]
    """[N] total counts of each cell before normalisation."""
    target_sum: float
    """The count every cell was scaled to before log1p."""
    mean_G: npt.NDArray[np.float64] | None = None
    """[G] mean of all control cells of the run in the contexts (and batches) of these, in their
    shares: a steadier level to start from than the mean of the few. None: their own mean."""


class TaskRunner(Protocol):
    """Maps a picklable function over items: in this process, or as Ray tasks.

    Results come in the order of the items; a failed item raises its own error.
    """

    def __call__(
        self, task: Callable[[Item], Result], items: Sequence[Item], *, what: str, unit: str
    ) -> Iterator[Result]:
        """Yield ``task(item)`` for each item; ``what`` and ``unit`` label the progress."""
        ...


def run_in_process(
    task: Callable[[Item], Result], items: Sequence[Item], *, what: str, unit: str
) -> Iterator[Result]:
    """Map a task over items in this process: the plainest ``TaskRunner``."""
    del what, unit
    return map(task, items)
