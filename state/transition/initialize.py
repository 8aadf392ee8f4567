"""Start a model from the weights of another one: every tensor whose name and shape fit.

Reads our checkpoints (a run folder, a checkpoint's folder, ``model.pt``, or the file of ``statewide
export``) and the reference's ``.ckpt``. Tested by ``pytest tests/unit/state/test_initialize.py``.
"""

from __future__ import annotations

import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from state.config import ConfigError
from state.transition.model import StateTransition
from state.transition.reference_checkpoint import is_reference, translate_reference

_MODEL_PREFIX = "model."
MAX_NAMES_IN_MESSAGE = 5


@dataclass(frozen=True)
class InitReport:
    """What became of the tensors of both sides."""

    source: str
    """The file."""
    taken: tuple[str, ...]
    """Our tensors that were filled."""
    fresh: dict[str, str]
    """Our tensors that keep their random start -> why."""
    unused: dict[str, str]
    """Tensors of the file without a place -> why."""

    def summary(self) -> str:
        """Say it in one line."""
        return (
            f"{len(self.taken)} tensors taken from {self.source}; {len(self.fresh)} keep their "
            f"random start, {len(self.unused)} of the file are not used"
        )


def find_weights(path: Path) -> Path:
    """Return the file with the weights: the path itself, or that of a run's newest checkpoint.

    Raises
    ------
    ConfigError
        If there is none.
    """
    if path.is_file():
        return path
    found = sorted(path.glob("model.pt")) or sorted(path.glob("checkpoints/step_*[0-9]/model.pt"))
    if not found:
        raise ConfigError(
            f"model.init_from = {str(path)!r} is neither a file nor the folder of a run with a "
            "checkpoint. Give a run folder, a model.pt, a .safetensors, or the reference's .ckpt"
        )
    return found[-1]


def initialize_from(model: StateTransition, path: Path) -> InitReport:
    """Fill the model, in place, with every tensor that has its name and shape.

    Raises
    ------
    ConfigError
        If the file cannot be read without running code in it, or nothing in it fits.
    """
    file = find_weights(path)
    tensors, unused = _read_tensors(file)
    ours = model.state_dict()
    named = {_our_name(name, model): tensor for name, tensor in tensors.items()}
    taken, fresh = [], {}
    with torch.no_grad():
        for name, tensor in ours.items():
            theirs = named.pop(name, None)
            if theirs is None:
                fresh[name] = "not in the file"
            elif theirs.shape != tensor.shape:
                fresh[name] = f"shape {list(tensor.shape)}, in the file {list(theirs.shape)}"
            elif not bool(theirs.isfinite().all()):
                raise ConfigError(f"model.init_from = {file}: {name} has NaN or infinite weights")
            else:
                tensor.copy_(theirs)
                taken.append(name)
    if not taken:
        examples = [f"{name}: {why}" for name, why in list(fresh.items())[:MAX_NAMES_IN_MESSAGE]]
        raise ConfigError(
            f"model.init_from = {file}: none of its {len(tensors)} tensors fits this model "
            f"({'; '.join(examples)}). Give [model] the sizes of that checkpoint"
        )
    unused |= dict.fromkeys(named.keys() - ours.keys(), "there is no such tensor in this model")
    return InitReport(str(file), tuple(taken), fresh, dict(sorted(unused.items())))


def _read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors under our names, and those of the reference that have none."""
    content = _load(file)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise ConfigError(f"model.init_from = {file} holds a {type(content).__name__}, no weights")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if is_reference(tensors):
        translation = translate_reference(tensors)
        return translation.tensors, dict(translation.skipped)
    return {name.removeprefix(_MODEL_PREFIX): value for name, value in tensors.items()}, {}


def _our_name(name: str, model: StateTransition) -> str:
    """Turn the n-th linear layer of an MLP, ``head.mlp.#1.weight``, into its place in ours."""
    path, marker, rest = name.partition(".#")
    if not marker:
        return name
    number, parameter = rest.split(".")
    mlp: Any = model
    for part in path.split("."):
        mlp = getattr(mlp, part, None)
    places = [place for place, layer in enumerate(mlp or ()) if isinstance(layer, nn.Linear)]
    place = places[int(number)] if int(number) < len(places) else f"layer_{number}"
    return f"{path}.{place}.{parameter}"


class _Inert:
    """Stands for an object of the reference's settings: takes anything and does nothing."""

    def __init__(self, *arguments: Any) -> None:
        del arguments

    def __setstate__(self, state: Any) -> None:
        del state


def _load(file: Path) -> Any:
    """Read tensors and plain values; no code that a file names is ever imported or run.

    A ``.ckpt`` of the reference also pickles objects among its settings, its loss module for one.
    """
    if file.suffix == ".safetensors":
        return _load_safetensors(file)
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        with torch.serialization.safe_globals([(_Inert, name) for name in named]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ConfigError(
            f"model.init_from = {file} is not a file of tensors, and anything else is not loaded "
            "because it could run code. Save the state_dict alone: "
            "torch.save(checkpoint['state_dict'], 'weights.pt')"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, zipfile.BadZipFile) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"model.init_from = {file} cannot be read as a torch file ({reason})"
        ) from None


def _load_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"model.init_from = {file} cannot be read as a safetensors file ({error})"
        ) from None
