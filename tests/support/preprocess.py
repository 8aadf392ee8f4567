"""Specs, fixtures and digests for the tests of ``preprocess``."""

import hashlib
from dataclasses import replace
from pathlib import Path

from data_store.preprocess import PreprocessSpec
from data_store.schema import ObsColumns

COLUMNS = ObsColumns(cell_type_key="cell_type", batch_col="batch")


def make_spec(source: Path, out: Path, **changes) -> PreprocessSpec:
    spec = PreprocessSpec(
        input=source,
        out=out,
        columns=COLUMNS,
        library_size_col=None,
        keep={},
        n_top_genes=20,
        rows_per_block=150,
    )
    return replace(spec, **changes)


def file_digests(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }
