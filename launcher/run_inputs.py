"""Files that a recipe names and that are not there, found before anything begins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_store.locate import find_files
from data_store.mirror import check_url
from data_store.schema import StoreError
from data_store.store import is_store
from launcher.errors import LaunchError
from launcher.mirroring import MIRROR_KEY
from state.config import RunConfig


def find_missing_inputs(config: RunConfig) -> list[str]:
    """Name the configured files that are not there, and a URL that nothing here can open."""
    made_here = config.simulate is not None
    named = {
        "features.path": None if made_here else config.features.path,
        "split.file": config.split.file,
        "train.deepspeed": config.train.deepspeed,
        "model.init_from": config.model.init_from,
    }
    problems = [
        f"{key} = {str(path)!r} does not exist"
        for key, path in named.items()
        if path is not None and not path.exists()
    ]
    data = config.data
    read = [] if data.embed_file is None else [("data.embed_file", data.embed_file)]
    if not (made_here or is_store(data.input)):
        read.append(("data.input", data.input))
    for key, location in read:
        try:
            find_files(location)
        except StoreError as error:
            problems.insert(0, f"{key} = {str(location)!r} does not exist: {error}")
    if config.train.checkpoint_mirror is not None:
        try:
            check_url(config.train.checkpoint_mirror, MIRROR_KEY)
        except StoreError as error:
            problems.append(str(error))
    return problems


def refuse_missing_inputs(config: RunConfig) -> None:
    """Raise ``LaunchError`` if a configured file is not there."""
    problems = find_missing_inputs(config)
    if problems:
        raise LaunchError(
            "\n".join(problems) + "\nCorrect the path in the recipe, or give it as KEY=PATH"
        )


def refuse_input_as_output(config: RunConfig, out: Path) -> None:
    """Raise ``LaunchError`` if ``out`` is a file that the run reads."""
    locations = [config.data.input, config.data.embed_file, config.features.path]
    read = [path for path in locations if isinstance(path, Path)]
    for location in read:
        inside = out.resolve().is_relative_to(location.resolve())
        if inside or out.resolve() in {Path(path).resolve() for path in _expand(location)}:
            raise LaunchError(
                f"--out {str(out)!r} is what this run reads ({location}). Name another file"
            )


def _expand(location: Path) -> Sequence[Path | str]:
    try:
        return find_files(location)
    except StoreError:
        # Gone since the run was made: there is nothing to write over.
        return ()
