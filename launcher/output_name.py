"""Refuse a ``--out`` that is a folder or has another ending, before any work is done."""

from __future__ import annotations

from pathlib import Path

from launcher.errors import LaunchError


def refuse_output_name(out: Path, suffix: str) -> None:
    """Raise ``LaunchError`` unless ``out`` can be a file that ends in ``suffix``."""
    if out.is_dir():
        raise LaunchError(
            f"--out {str(out)!r} is a folder. Name the file to write, such as {out}/new{suffix}"
        )
    if out.suffix != suffix:
        raise LaunchError(
            f"--out {str(out)!r} must end in {suffix}: what is written is such a file, whatever "
            "its name"
        )
