"""Run the checks of the fused MMD in Triton's interpreter, in a process of their own.

``python -m tests.support.mmd_interpreter OUT.json`` with ``TRITON_INTERPRET=1`` writes, for each
check, "ok" or the traceback. A process of its own, because what ``triton.jit`` returns depends on
the variable, and the ahead-of-time tests need the other kind.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def round_to_nearest_as_gpus_do() -> None:
    """Let the interpreter round float32 to bfloat16 to nearest even; 3.9.0 truncates."""
    convert = interpreter._convert_float

    def rounding(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if source != tl.float32 or target != tl.bfloat16:
            return convert(data, source, target, mode)
        bits = data.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)

    interpreter._convert_float = rounding


def main(out: Path) -> None:
    from tests.support.fused_checks import CHECKS

    round_to_nearest_as_gpus_do()
    torch.set_num_threads(1)
    results = {}
    for name, check in CHECKS.items():
        start = time.perf_counter()
        try:
            check(torch.device("cpu"))
            results[name] = "ok"
        except Exception:  # noqa: BLE001 - whatever it is, the test shows it
            results[name] = traceback.format_exc()
        print(f"{name}: {time.perf_counter() - start:.1f} s")
    out.write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
