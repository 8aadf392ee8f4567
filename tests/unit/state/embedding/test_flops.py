"""The count of SE's arithmetic, against torch's own counter."""

import numpy as np
import pytest
from torch.utils.flop_counter import FlopCounterMode

from state.embed_config import EmbedLossConfig
from state.embedding.flops import EmbeddingFlops
from state.embedding.objective import EmbeddingObjective
from tests.support.embedding import as_tensors, tiny_batch, tiny_model


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("num_datasets", [1, 3])
def test_the_count_is_torchs(norm: str, num_datasets: int):
    model = tiny_model(norm=norm, num_datasets=num_datasets)
    objective = EmbeddingObjective(model, EmbedLossConfig(), num_shared=5)
    batch = tiny_batch(8)
    full = batch.mask_BT.all(1)
    assert full.sum() >= 2
    # Only full cells: torch counts attention to empty places too.
    batch = type(batch)(*(array[full] for array in batch))
    with FlopCounterMode(display=False) as counter:
        objective(*as_tensors(batch)).loss.backward()
    flops = EmbeddingFlops(model, num_asked=batch.asked_BK.shape[1])
    assert flops.count_cells(batch.sizes_B) == full.sum()
    # torch does not count attention on a CPU.
    attention = float(np.square(batch.sizes_B).sum()) * 2 * 12 * 16
    counted = counter.get_total_flops()
    assert flops.count_step(batch.sizes_B) - attention == pytest.approx(counted, rel=0.01)
