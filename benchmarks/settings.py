"""What the command line sets for every benchmark."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.harness import Side


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

    large: bool = False
    """Whether ``evaluate`` also takes its largest table, which takes its peers an hour."""

    def measurable(self, *sides: Side) -> list[Side]:
        """Return the sides that may be measured."""
        return [side for side in sides if self.peers or side.environment is None]
