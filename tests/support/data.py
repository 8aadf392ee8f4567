"""Find the real data sets, which are not part of the repository."""

import os
from pathlib import Path

import pytest

REPO_ROOT = Path(__file__).resolve().parents[2]


def data_path(name: str) -> Path:
    """Return the path of a data file, or skip the test that asks for it.

    Its folder is ``STATEWIDE_DATA``; where that is not set, ``shared/data`` beside the checkout.
    """
    root = Path(os.environ.get("STATEWIDE_DATA", REPO_ROOT.parent / "shared" / "data"))
    path = root / name
    if not path.exists():
        pytest.skip(f"{path} is not there: set STATEWIDE_DATA to the folder with the real data")
    return path
