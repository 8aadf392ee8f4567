"""Read what users saved with ``torch.save``, as plain tensors only."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from state.config import ConfigError


def load_tensor_file(path: Path, setting: str) -> Any:
    """Load a file of plain tensors in dicts and lists to the CPU.

    Parameters
    ----------
    path
        The file.
    setting
        What messages call it, such as ``"features.path = x.pt"``.

    Raises
    ------
    ConfigError
        If it is another file, or holds anything that could run code.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        # torch's own text advises to switch the protection off.
        raise ConfigError(
            f"{setting} is not a file of plain tensors, and anything else is not "
            "loaded because it could run code. Save it as torch.save(dict[str, Tensor], path)"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, zipfile.BadZipFile) as error:
        reason = (str(error) or type(error).__name__).split(". ")[0].splitlines()[0]
        raise ConfigError(
            f"{setting} cannot be read as a torch file ({reason}). "
            "Save it as torch.save(dict[str, Tensor], path)"
        ) from None
