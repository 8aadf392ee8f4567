"""Storage that fails: one message, nothing lost, and the same command goes on."""

import re
import shutil
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.support.runs import losses, statewide, write_recipe
from tests.support.small_disk import resize, small_disk

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

SETTINGS = (
    *("train.max_steps=24", "train.checkpoint_every_steps=6", "train.val_every_steps=6"),
    *("statistics.enabled=false", "--local"),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to; its recipe."""
    recipe = write_recipe(tmp_path_factory.mktemp("finished"))
    done = statewide("train", recipe, *SETTINGS)
    assert done.returncode == 0, done.stderr
    return recipe


def test_a_full_disk_ends_training_and_more_room_lets_it_go_on(finished: Path, tmp_path: Path):
    recipe = write_recipe_for_the_data_of(finished, tmp_path)
    # Two checkpoints fit, three do not.
    with small_disk(tmp_path / "disk", "1400k") as disk:
        command = ("train", recipe, *SETTINGS, f"output_dir={disk}/run")
        full = statewide(*command)
        refuse_politely(full)
        said = re.search(r"no space left on the disk of \S*/(step_\d+) .*are free\)", full.stderr)
        assert said, full.stderr
        assert said[1] == "step_00000018"
        kept = sorted(path.name for path in (disk / "run" / "checkpoints").iterdir())
        assert kept == ["step_00000006", "step_00000012"]
        resize(disk, "8m")
        resumed = statewide(*command)
        assert resumed.returncode == 0, resumed.stderr
        assert "(step 12)" in (disk / "run" / "logs" / "train_rank0.log").read_text()
        assert losses(disk / "run") == losses(finished.parent / "run")


def test_a_torn_shard_is_named_and_mended(finished: Path, tmp_path: Path):
    """A byte of one chunk changes between two runs; training reads it when a set needs it."""
    recipe = write_recipe_for_the_data_of(finished, tmp_path)
    store = tmp_path / "store"
    shutil.copytree(finished.parent / "run" / "store", store)
    command = ("train", recipe, *SETTINGS, f"data.input={store}", f"output_dir={tmp_path}/run")
    stopped = statewide(*command, "faults.exception_at_step=9")
    assert stopped.returncode == 2, stopped.stderr
    shard = store / "obsm" / "X_hvg" / "c" / "0" / "0"
    whole = shard.read_bytes()
    with shard.open("r+b") as handle:
        handle.seek(len(whole) // 2)
        handle.write(bytes([whole[len(whole) // 2] ^ 1]))
    torn = statewide(*command, "data.resident_gib=0")
    refuse_politely(torn)
    said = f"{shard} is missing or damaged (the checksum of a chunk is wrong)"
    assert said in torn.stderr
    repair = re.search(r"statewide (store verify \S+ --repair)", torn.stderr)
    assert repair, torn.stderr
    mended = statewide(*repair[1].split())
    assert mended.returncode == 0, mended.stderr
    assert shard.read_bytes() == whole
    resumed = statewide(*command, "data.resident_gib=0")
    assert resumed.returncode == 0, resumed.stderr
    assert losses(tmp_path / "run") == losses(finished.parent / "run")


def refuse_politely(done: CompletedProcess[str]) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr


def write_recipe_for_the_data_of(recipe: Path, folder: Path) -> Path:
    """Write the same recipe for what that one has simulated and preprocessed."""
    text = recipe.read_text()
    start, stop = text.index("[simulate]"), text.index("[data]")
    run_dir = recipe.parent / "run"
    path = folder / "elsewhere.toml"
    path.write_text(
        (text[:start] + text[stop:]).replace(f"{run_dir}/atlas.h5ad", f"{run_dir}/store")
    )
    return path
