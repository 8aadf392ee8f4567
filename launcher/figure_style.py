"""The look that all figures share: 8 point type, 300 dots per inch, colours for everyone's eyes.

Drawn without pyplot, so no window system is asked for and nothing is left open. Colours are
those of Okabe and Ito, which the colour-blind can tell apart.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.figure import Figure

from data_store.files import write_bytes_atomically

COLUMN_IN: Final = 3.5
"""Width of one column of a journal's page."""
PAGE_IN: Final = 7.1
"""Width of two."""
HEIGHT_IN: Final = 2.5
DPI: Final = 300
BLUE, VERMILION, GREY, DARK = "#0072B2", "#D55E00", "#8C8C8C", "#404040"
LIGHT: Final = "#C9C9C9"
DASHES: Final = (0, (4, 3))
# matplotlib's own type for it lists every key it knows.
_STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "pdf.fonttype": 42,
    "svg.hashsalt": "statewide",
}


@contextmanager
def paper_style() -> Iterator[None]:
    """Apply the style to what is drawn in the block."""
    with mpl.rc_context(_STYLE):
        yield


def new_figure(height_in: float, width_in: float = COLUMN_IN) -> Figure:
    """Open a figure without pyplot."""
    return Figure(figsize=(width_in, height_in), dpi=DPI, layout="constrained")


def to_png(figure: Figure) -> bytes:
    """Render a figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def save_figure(figure: Figure, stem: Path) -> Path:
    """Write a figure as PNG and as PDF; return the PNG's path."""
    buffer = io.BytesIO()
    with paper_style():
        # Without a date the same figure is the same file.
        figure.savefig(buffer, format="pdf", dpi=DPI, metadata={"CreationDate": None})
        png = to_png(figure)
    write_bytes_atomically(stem.with_suffix(".pdf"), buffer.getvalue())
    path = stem.with_suffix(".png")
    write_bytes_atomically(path, png)
    return path
