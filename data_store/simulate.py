"""Write an atlas with known effects: an h5ad of any size, block by block, in bounded memory.

``statewide simulate --out atlas.h5ad`` and the demo come here. Beside the h5ad lie
``<stem>_truth.npz`` (true log2 fold changes) and, where asked for, a ``dict[str, Tensor]`` of
perturbation features from which the effects of unseen perturbations can be predicted.
Tests: ``pytest tests/unit/data_store/test_simulate.py``.
"""

from __future__ import annotations

import io
import json
import logging
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from anndata.io import write_elem

from data_store.atlas_model import (
    CONTROL,
    AtlasModel,
    CellPlan,
    build_model,
    cut_blocks,
    draw_counts,
    plan_cells,
)
from data_store.csr_writer import Compression, CsrWriter
from data_store.files import file_made_whole, remove_abandoned, write_bytes_atomically
from data_store.schema import ObsColumns, StoreError, TaskRunner, run_in_process
from data_store.simulation_spec import SimulationSpec

__all__ = ["SimulationSpec", "simulate_atlas", "truth_path"]

logger = logging.getLogger(__name__)

# Part of what a seed means, so not a setting.
_ROWS_PER_BLOCK = 512
_COLUMNS = ObsColumns(cell_type_key="cell_type", batch_col="batch")


def simulate_atlas(
    spec: SimulationSpec,
    out: Path,
    features_out: Path | None = None,
    run_tasks: TaskRunner = run_in_process,
    compression: Compression = "gzip",
) -> None:
    """Write the atlas of a spec; do nothing for files that hold it already.

    Parameters
    ----------
    spec
        What to simulate.
    out
        h5ad to write: ``X`` raw counts (CSR, of ``spec.count_type``); ``obs`` columns
        ``target_gene`` (control ``non-targeting``), ``batch``, ``cell_type``; the spec in
        ``uns["simulation"]``.
    features_out
        Perturbation features to write, as ``torch.save`` of ``dict[str, Tensor]`` (float32, D).
    run_tasks
        Draws the blocks of counts; the result is the same with any runner.
    compression
        Filter of ``X``. A finished file is kept whatever its filter.

    Raises
    ------
    StoreError
        When ``out`` or ``features_out`` exists with other content, or the disk is full. Files
        appear complete or not at all, the h5ad last.
    """
    is_there = _holds_atlas(out, spec)
    model = build_model(spec)
    if features_out is not None:
        _write_features(features_out, spec, model)
    if not is_there or not truth_path(out).exists():
        _write_truth(truth_path(out), spec, model)
    if is_there:
        logger.info("%s holds this simulation already", out)
        return
    plan = plan_cells(spec)
    remove_abandoned(out)
    with file_made_whole(out) as temporary, h5py.File(temporary, "w") as file:
        _write_annotations(file, spec, model, plan)
        matrix = CsrWriter(
            file, spec.num_cells, spec.num_genes, np.dtype(spec.count_type), compression
        )
        blocks = cut_blocks(plan, _ROWS_PER_BLOCK)
        draw = partial(draw_counts, model=model, seed=spec.seed)
        for counts in run_tasks(draw, blocks, what="simulate", unit="cells"):
            matrix.append(counts)
        matrix.finish()


def truth_path(out: Path) -> Path:
    """Return where the truth of an atlas lies.

    The npz holds ``log2_fold_change`` [P, G] (of a cell that feels the perturbation fully: a
    tenth of the cells feels nothing), ``perturbations`` [P] and ``genes`` [G].
    """
    return out.with_name(f"{out.stem}_truth.npz")


def _write_annotations(
    file: h5py.File, spec: SimulationSpec, model: AtlasModel, plan: CellPlan
) -> None:
    file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    genes = spec.genes
    # Code 0 is the control; categories need not be sorted.
    pert_names = [_COLUMNS.control_pert, *(genes[target] for target in model.target_P)]
    columns = {
        str(_COLUMNS.pert_col): pd.Categorical.from_codes(plan.pert_N - CONTROL, pert_names),
        _COLUMNS.batch_col: _number(plan.batch_N, "batch", spec.num_batches),
        _COLUMNS.cell_type_key: _number(plan.context_N, "line", spec.num_contexts),
    }
    index = [f"cell_{cell}" for cell in range(spec.num_cells)]
    write_elem(file, "obs", pd.DataFrame(columns, index=index))
    write_elem(file, "var", pd.DataFrame(index=list(genes)))
    write_elem(file, "uns", {"simulation": json.dumps(spec.describe(), sort_keys=True)})
    for name in ("layers", "obsm", "obsp", "varm", "varp"):
        write_elem(file, name, {})


def _number(codes: npt.NDArray[np.int64], name: str, count: int) -> pd.Categorical:
    return pd.Categorical.from_codes(codes, [f"{name}_{index}" for index in range(count)])


def _holds_atlas(out: Path, spec: SimulationSpec) -> bool:
    """Tell whether the atlas of this spec is there; refuse to replace anything else."""
    if not out.exists():
        return False
    known = _read_description(out)
    if known is None:
        raise StoreError(
            f"{out} exists and was not simulated: it is left as it is. Give another path as "
            "data.input (or --out), or remove the [simulate] section to use the file"
        )
    wanted = spec.describe()
    if known != wanted:
        keys = [key for key in sorted(known | wanted) if known.get(key) != wanted.get(key)]
        changes = ", ".join(
            f"{key} = {known.get(key)} there, {wanted.get(key)} asked" for key in keys
        )
        raise StoreError(
            f"{out} holds another simulation ({changes}). Remove the file, give another path as "
            "data.input (or --out), or ask for the same [simulate] values"
        )
    return True


def _read_description(path: Path) -> dict[str, Any] | None:
    if not path.is_file() or not h5py.is_hdf5(path):
        return None
    with h5py.File(path, "r") as file:
        if "uns/simulation" not in file:
            return None
        return dict(json.loads(file["uns/simulation"].asstr()[()]))


def _write_features(path: Path, spec: SimulationSpec, model: AtlasModel) -> None:
    genes = spec.genes
    # A row of a larger tensor would be saved with the whole of it.
    features = {
        genes[target]: torch.from_numpy(row.copy())
        for target, row in zip(model.target_P.tolist(), model.features_PD, strict=True)
    }
    if not path.exists():
        buffer = io.BytesIO()
        torch.save(features, buffer)
        write_bytes_atomically(path, buffer.getvalue())
    elif not _holds_features(path, features):
        raise StoreError(
            f"{path} exists and does not hold the features of this simulation: it is left as it "
            "is. Remove it, or give another path as features.path"
        )


def _holds_features(path: Path, features: dict[str, torch.Tensor]) -> bool:
    try:
        known = torch.load(path, weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError):
        return False
    if not isinstance(known, dict) or known.keys() != features.keys():
        return False
    return all(torch.equal(known[name], values) for name, values in features.items())


def _write_truth(path: Path, spec: SimulationSpec, model: AtlasModel) -> None:
    genes = np.array(spec.genes)
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        log2_fold_change=(model.log_fold_change_PG / np.log(2.0)).astype(np.float32),
        perturbations=genes[model.target_P],
        genes=genes,
    )
    write_bytes_atomically(path, buffer.getvalue())
