"""Run a trained model over batches and hand out the predicted cells.

Shape legend: B cell sets, S slots in a set, G genes, N real cells of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
import torch

from data_store.schema import CellBatch
from state.batch_tensors import move_array, move_values
from state.losses import SetObjective


def predict_cells(
    objective: SetObjective, batches: Iterable[CellBatch]
) -> Iterator[npt.NDArray[np.float32]]:
    """Predict the cells of each batch, without dropout and without gradients.

    Yields
    ------
    ndarray
        float32 [N, G] log1p expression of the real cells of one batch, in the order of sets and
        slots. The mode of the module (train or eval) is restored between batches.
    """
    device = objective.features_PD.device
    for batch in batches:
        control_BSG = move_values(batch.control_BSG, device)
        mask_BS, pert_B, batch_BS = (
            move_array(array, device) for array in (batch.mask_BS, batch.pert_B, batch.batch_BS)
        )
        was_training = objective.training
        objective.eval()
        try:
            with torch.inference_mode():
                predicted_BSG = objective.predict(control_BSG, mask_BS, pert_B, batch_BS)
                predicted_NG = predicted_BSG[mask_BS].float().cpu()
        finally:
            objective.train(was_training)
        yield predicted_NG.numpy()
