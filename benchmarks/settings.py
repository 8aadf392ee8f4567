"""What the command line sets for every benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Workers: TypeAlias = Literal["one", "ray"]


@dataclass(frozen=True)
class Settings:
    """Sizes and repetitions."""

    cells: int
    """Cells of the atlas to preprocess."""
    genes: int
    """Its genes."""
    rounds: int
    """Measured rounds of every comparison."""
    atlas_cells: tuple[int, ...]
    """Sizes of the atlases of ``atlas``."""
    depth: float
    """Sequencing depth of its atlases; 1 is the challenge's."""
    folder: str
    """Where ``atlas`` keeps its files while it runs."""
    workers: Workers
    """Whether ``atlas`` runs its tasks in one process or as Ray tasks."""
