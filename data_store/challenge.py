"""Pack a prediction as the Virtual Cell Challenge takes it: a ``.vcc`` archive.

The archive is a tar of ``watermark.txt`` and ``pred.h5ad.zst``, which holds the cells by genes in
the challenge's order, float32 CSR, and one ``obs`` column, ``target_gene``.
"""

from __future__ import annotations

import io
import tarfile
import tempfile
from pathlib import Path
from typing import Final

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from data_store.files import file_made_whole, full_disk_is_a_user_error
from data_store.h5ad_file import write_h5ad
from data_store.schema import ObsColumns, StoreError
from data_store.tables import read_cell_table

PERT_COL: Final = "target_gene"
"""The column's name in the archive, whatever it was in the prediction."""
WATERMARK: Final = b"vcc-prep"
"""What the challenge's server expects in ``watermark.txt``."""
_LEVEL: Final = 3


def write_challenge_archive(
    pred: Path, genes: Path, out: Path, columns: ObsColumns, *, max_cells: int
) -> str:
    """Write the archive and return a line that describes it.

    Parameters
    ----------
    pred
        Predicted and control cells, h5ad or zarr, log-normalised.
    genes
        csv without header, whose first column names the challenge's genes in order.
    out
        The archive.
    columns
        ``obs`` column and control label of the prediction.
    max_cells
        The challenge's limit.

    Raises
    ------
    StoreError
        If genes are missing or unknown, there are too many cells, the prediction cannot be read,
        or zstandard is not installed.
    """
    names = _read_gene_names(genes)
    table = read_cell_table(pred, columns)
    unknown = sorted(set(table.genes) - set(names))
    if unknown:
        raise StoreError(
            f"{pred} has {len(unknown)} genes that {genes} lacks, such as {unknown[0]!r}: the "
            "challenge takes exactly its own genes. Leave the others out"
        )
    table = read_cell_table(pred, columns, names)
    if len(table.labels) > max_cells:
        raise StoreError(
            f"{pred} has {len(table.labels)} cells, but the challenge takes at most {max_cells} "
            "(--max-cells): predict fewer cells of each perturbation"
        )
    labels = np.array(table.label_names, dtype=object)[table.labels]
    obs = pd.DataFrame({PERT_COL: labels}, index=np.arange(len(labels)).astype(str))
    cells = ad.AnnData(
        sp.csr_matrix(table.values, dtype=np.float32), obs=obs, var=pd.DataFrame(index=list(names))
    )
    with full_disk_is_a_user_error(out):
        size = _pack(cells, out)
    return f"{out}: {cells.n_obs} cells, {cells.n_vars} genes, {size / 2**20:.1f} MiB"


def _pack(cells: ad.AnnData, out: Path) -> int:
    try:
        import zstandard
    except ImportError as error:
        raise StoreError(
            "statewide prep needs the package zstandard: pip install zstandard"
        ) from error
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as name:
        plain, packed = Path(name) / "pred.h5ad", Path(name) / "pred.h5ad.zst"
        write_h5ad(cells, plain)
        with plain.open("rb") as source, packed.open("wb") as target:
            size = plain.stat().st_size
            zstandard.ZstdCompressor(level=_LEVEL).copy_stream(source, target, size=size)
        plain.unlink()
        with file_made_whole(out) as temporary, tarfile.open(temporary, mode="w") as archive:
            info = tarfile.TarInfo("watermark.txt")
            info.size = len(WATERMARK)
            archive.addfile(info, io.BytesIO(WATERMARK))
            archive.add(packed, arcname="pred.h5ad.zst")
    return out.stat().st_size


def _read_gene_names(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(
            f"--genes {path} cannot be read as text: {error}. Give the challenge's list of genes, "
            "a csv without header"
        ) from error
    names = tuple(name for line in lines if (name := line.split(",")[0].strip().strip('"')))
    if not names or len(set(names)) < len(names):
        raise StoreError(
            f"--genes {path} must name each gene once, one a line; it has {len(names)} lines and "
            f"{len(set(names))} different names"
        )
    return names
