"""A disk that really is full: training ends with one message, and goes on when there is room."""

import re
from pathlib import Path

import pytest

from tests.support.runs import losses, statewide, write_recipe
from tests.support.small_disk import resize, small_disk

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

SETTINGS = (
    *("train.max_steps=24", "train.checkpoint_every_steps=6", "train.val_every_steps=6"),
    *("statistics.enabled=false", "--local"),
)


def test_a_full_disk_ends_training_and_more_room_lets_it_go_on(tmp_path: Path):
    recipe = write_recipe(tmp_path)
    finished = statewide("train", recipe, *SETTINGS)
    assert finished.returncode == 0, finished.stderr
    elsewhere = write_recipe_for_the_data_of(recipe)
    # Two checkpoints fit, three do not.
    with small_disk(tmp_path / "disk", "1400k") as disk:
        command = ("train", elsewhere, *SETTINGS, f"output_dir={disk}/run")
        full = statewide(*command)
        assert full.returncode == 2, full.stderr
        assert full.stderr.count("error:") == 1
        assert "Traceback" not in full.stderr
        found = re.search(r"no space left on the disk of \S*/(step_\d+) .*are free\)", full.stderr)
        assert found, full.stderr
        kept = sorted(path.name for path in (disk / "run" / "checkpoints").iterdir())
        assert kept == ["step_00000006", "step_00000012"]
        assert found[1] == "step_00000018"
        resize(disk, "8m")
        resumed = statewide(*command)
        assert resumed.returncode == 0, resumed.stderr
        assert "(step 12)" in (disk / "run" / "logs" / "train_rank0.log").read_text()
        assert losses(disk / "run") == losses(tmp_path / "run")


def write_recipe_for_the_data_of(recipe: Path) -> Path:
    """Write the same recipe for what that one has simulated and preprocessed."""
    text = recipe.read_text()
    start, stop = text.index("[simulate]"), text.index("[data]")
    run_dir = recipe.parent / "run"
    path = recipe.with_name("elsewhere.toml")
    path.write_text(
        (text[:start] + text[stop:]).replace(f"{run_dir}/atlas.h5ad", f"{run_dir}/store")
    )
    return path
