"""Compile Triton kernels ahead of time, without a GPU, and read what the machine code says.

Needs triton, whose wheel brings ptxas, cuobjdump and nvdisasm.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# The tensor-core instruction of each generation; on sm_90 the older one runs at half the rate.
TENSOR_OPS = {80: "HMMA", 90: "HGMMA"}
DIVISIBLE_BY_16 = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Listing:
    """What a compiled kernel uses."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    num_threads: int
    local_accesses: int
    """LDL and STL: spilled registers."""
    tensor_ops: int
    """HMMA or HGMMA, whichever the generation's own is."""
    arithmetic: Mapping[str, int]
    """Instructions by name, without suffixes."""


def compile_kernel(
    kernel: Any,
    capability: int,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    num_warps: int,
    num_stages: int,
    options: Mapping[str, Any],
    work_dir: Path,
    odd: frozenset[str] = frozenset(),
) -> Listing:
    """Compile for ``sm_<capability>``; all pointers and sizes but ``odd`` divide by 16."""
    names = list(types)
    signature = dict(types) | dict.fromkeys(constants, "constexpr")
    # The order of the parameters decides what an index in attrs means.
    order = [name for name in kernel.arg_names if name in signature]
    assert set(order) == set(kernel.arg_names), set(kernel.arg_names) ^ set(order)
    attrs = {(order.index(name),): DIVISIBLE_BY_16 for name in names if name not in odd}
    source = ASTSource(
        fn=kernel,
        signature={name: signature[name] for name in order},
        constexprs={(order.index(name),): value for name, value in constants.items()},
        attrs=attrs,
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps, "num_stages": num_stages, **options},
    )
    path = work_dir / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    usage = _run("cuobjdump", "--dump-resource-usage", path)
    found = re.search(r"REG:(\d+) STACK:(\d+) ", usage)
    assert found, usage
    counts: dict[str, int] = {}
    for operation in re.findall(
        r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", _run("nvdisasm", path), re.M
    ):
        counts[operation] = counts.get(operation, 0) + 1
    return Listing(
        registers=int(found[1]),
        stack_bytes=int(found[2]),
        shared_bytes=compiled.metadata.shared,
        num_threads=32 * num_warps,
        local_accesses=counts.get("LDL", 0) + counts.get("STL", 0),
        tensor_ops=counts.get(TENSOR_OPS[capability], 0),
        arithmetic=counts,
    )


def _run(tool: str, *arguments: str | Path) -> str:
    command = [str(TOOLS / tool), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
