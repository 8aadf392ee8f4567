"""Complete a small DeepSpeed JSON: batch sizes, clipping and precision come from the recipe.

DeepSpeed ignores a misspelt top-level key in silence and then trains at ZeRO stage 0, so every
key is checked here against the ones that have a meaning for this project.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from launcher.errors import LaunchError
from state.config import TrainConfig

# What a recipe's JSON may set. Everything else either belongs to the recipe (see _OWNED) or
# would have no effect.
_ALLOWED = frozenset(
    {
        "activation_checkpointing",
        "communication_data_type",
        "comms_logger",
        "data_types",
        "dump_state",
        "flops_profiler",
        "gradient_predivide_factor",
        "prescale_gradients",
        "steps_per_print",
        "wall_clock_breakdown",
        "zero_allow_untested_optimizer",
        "zero_optimization",
    }
)

_OWNED = {
    "bf16": "train.precision",
    "fp16": "train.precision",
    "gradient_accumulation_steps": "train.grad_accum_steps",
    "gradient_clipping": "train.grad_clip",
    "optimizer": "train.lr and train.weight_decay",
    "scheduler": "train.schedule",
    "train_batch_size": "train.micro_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
}


def read_deepspeed_json(path: Path) -> dict[str, Any]:
    """Read and check a DeepSpeed JSON.

    Raises
    ------
    LaunchError
        For a missing or malformed file, a key that DeepSpeed would ignore, a key that the recipe
        owns, or a ZeRO stage other than 0 to 3.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LaunchError(
            f"train.deepspeed = {str(path)!r} does not exist. The shipped ones are "
            "configs/deepspeed/zero0.json to zero3.json"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise LaunchError(f"train.deepspeed = {str(path)!r} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise LaunchError(f"train.deepspeed = {str(path)!r} must hold one JSON object")
    for key in content:
        _check_key(key, path)
    zero = content.setdefault("zero_optimization", {"stage": 0})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else zero
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise LaunchError(f"{path}: zero_optimization.stage = {stage!r} must be 0, 1, 2 or 3")
    zero["stage"] = stage
    return content


def complete_deepspeed_config(
    base: dict[str, Any], settings: TrainConfig, *, world_size: int
) -> dict[str, Any]:
    """Fill in the numbers that must agree between the recipe, the data and DeepSpeed.

    DeepSpeed's own bf16 stays off: it would round the weights, and at ZeRO stage 0 keep no others.
    The objective computes in bf16 by itself (``SetObjective.use_bf16``).
    """
    return {
        "steps_per_print": 10**9,
        **base,
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.grad_accum_steps,
        "train_batch_size": settings.micro_batch_size * settings.grad_accum_steps * world_size,
        "gradient_clipping": settings.grad_clip,
    }


def _check_key(key: str, path: Path) -> None:
    if key in _OWNED:
        raise LaunchError(f"{path}: {key!r} is set by the recipe. Set {_OWNED[key]} there instead")
    if key not in _ALLOWED:
        near = difflib.get_close_matches(key, sorted(_ALLOWED), n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise LaunchError(
            f"{path}: unknown key {key!r}, which DeepSpeed would ignore in silence. {hint}"
            f"Allowed: {', '.join(sorted(_ALLOWED))}"
        )
