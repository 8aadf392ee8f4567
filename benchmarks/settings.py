"""What the command line sets for every benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """Sizes and repetitions."""

    cells: int
    """Cells of the atlas to preprocess."""
    genes: int
    """Its genes."""
    rounds: int
    """Measured rounds of every comparison."""
    arc_env: Path
    """Virtual environment with arc-state."""
