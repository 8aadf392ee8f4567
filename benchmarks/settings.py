"""What the command line sets for every benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from benchmarks.harness import Side

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
    peers: bool
    """Whether sides that need an environment of their own are measured."""
    atlas_cells: tuple[int, ...]
    """Sizes of the atlases of ``atlas``."""
    depth: float
    """Sequencing depth of its atlases; 1 is the challenge's."""
    folder: str
    """Where ``atlas`` keeps its files while it runs."""
    workers: Workers
    """Whether ``atlas`` runs its tasks in one process or as Ray tasks."""

    def measurable(self, *sides: Side) -> list[Side]:
        """Return the sides that may be measured."""
        return [side for side in sides if self.peers or side.environment is None]
