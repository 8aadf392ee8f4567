"""A run folder belongs to one config and one process."""

import subprocess
import sys
from pathlib import Path

import pytest

from launcher.errors import LaunchError
from launcher.run_folder import RunFolder, open_run_folder
from state.config import RunConfig


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig.model_validate(
        {"name": "r", "output_dir": tmp_path / "run", "data": {"input": tmp_path / "a.h5ad"}}
    )


@pytest.fixture
def folder(config: RunConfig) -> RunFolder:
    folder = RunFolder(config.output_dir)
    folder.path.mkdir()
    folder.adopt(config, overwrite=False)
    return folder


def with_train(config: RunConfig, **changes: object) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update=changes)})


def test_the_same_config_comes_back(folder: RunFolder, config: RunConfig):
    folder.adopt(config, overwrite=False)
    assert open_run_folder(folder.path)[1] == config


def test_a_setting_may_be_corrected_before_the_first_checkpoint(folder: RunFolder, config):
    folder.adopt(with_train(config, lr=0.5), overwrite=False)
    assert open_run_folder(folder.path)[1].train.lr == 0.5


def test_another_config_is_refused_with_the_difference(folder: RunFolder, config: RunConfig):
    (folder.checkpoints / "step_00000001").mkdir(parents=True)
    before = folder.config.read_text()
    with pytest.raises(LaunchError, match=r"train\.lr: 0\.0001 -> 0\.5") as caught:
        folder.adopt(with_train(config, lr=0.5), overwrite=False)
    assert "--overwrite" in str(caught.value)
    assert folder.config.read_text() == before


def test_where_and_against_what_may_change(folder: RunFolder, config: RunConfig):
    cluster = config.cluster.model_copy(update={"num_workers": 7})
    evaluate = config.evaluate.model_copy(update={"checkpoint": "last"})
    changed = config.model_copy(update={"cluster": cluster, "evaluate": evaluate})
    folder.adopt(with_train(changed, log_every_steps=3), overwrite=False)
    assert open_run_folder(folder.path)[1].cluster.num_workers == 7


def test_overwrite_clears_a_run_but_nothing_else(folder: RunFolder, config: RunConfig, tmp_path):
    (folder.path / "checkpoints").mkdir()
    folder.adopt(with_train(config, lr=0.5), overwrite=True)
    assert not (folder.path / "checkpoints").exists()

    foreign = tmp_path / "home"
    foreign.mkdir()
    (foreign / "config.toml").write_text("[tool]\n")
    (foreign / "thesis.doc").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(LaunchError, match="not a run folder"):
            RunFolder(foreign).adopt(config, overwrite=overwrite)
    assert (foreign / "thesis.doc").exists()


def test_overwrite_does_not_delete_an_input_in_the_folder(folder: RunFolder, config: RunConfig):
    data = config.data.model_copy(update={"input": folder.path / "store"})
    (folder.path / "store").mkdir()
    (folder.path / "notes.txt").write_text("precious")
    with pytest.raises(LaunchError, match="Move it elsewhere"):
        folder.adopt(config.model_copy(update={"data": data}), overwrite=True)
    assert (folder.path / "store").exists()
    folder.adopt(config, overwrite=True)
    assert not (folder.path / "store").exists()
    assert (folder.path / "notes.txt").exists()


def test_a_folder_without_a_run_is_named(tmp_path: Path):
    with pytest.raises(LaunchError, match="not a run folder"):
        open_run_folder(tmp_path)


HOLD = """
import sys
from pathlib import Path
from launcher.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_told_who_holds_the_folder(folder: RunFolder):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LaunchError, match=f"process {holder.pid}"), folder.lock():
            pass
        holder.kill()
    with folder.lock():
        pass
