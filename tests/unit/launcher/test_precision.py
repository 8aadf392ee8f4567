"""Which arithmetic ``train.precision = "auto"`` chooses."""

from pathlib import Path

import pytest
import torch

from launcher.train_worker import cpu_multiplies_bf16, uses_bf16
from state.config import TrainConfig


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("fma avx512f avx512_bf16", True), ("amx_bf16", True), ("avx2 avx512f", False)],
)
def test_a_cpu_with_bf16_products_is_known_by_its_flags(flags, expected, tmp_path: Path):
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor : 0\nflags : fpu {flags} sse\n")
    assert cpu_multiplies_bf16(path) is expected


def test_without_cpuinfo_it_is_fp32(tmp_path: Path):
    assert not cpu_multiplies_bf16(tmp_path / "none")


def test_what_is_asked_for_is_used():
    cpu = torch.device("cpu")
    assert uses_bf16(TrainConfig(precision="bf16"), cpu)
    assert not uses_bf16(TrainConfig(precision="fp32"), cpu)
    assert uses_bf16(TrainConfig(), cpu) == cpu_multiplies_bf16()
