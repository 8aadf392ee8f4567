"""Names of outputs are refused before anything is read."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from launcher.cli import app
from launcher.errors import LaunchError
from launcher.run_inputs import refuse_input_as_output
from state.config import DataConfig, RunConfig
from state.model_config import ModelConfig


@pytest.mark.parametrize(
    ("command", "suffix"),
    [
        (("predict", "no_run"), ".h5ad"),
        (("prep", "no.h5ad", "--genes", "no.csv"), ".vcc"),
        (("export", "no_run"), ".safetensors"),
    ],
)
def test_a_folder_and_another_ending_are_refused(command, suffix: str, tmp_path: Path):
    for out, said in (
        (tmp_path, f"is a folder. Name the file to write, such as {tmp_path}/new{suffix}"),
        (tmp_path / "out.txt", f"must end in {suffix}"),
    ):
        done = CliRunner().invoke(app, [*command, "--out", str(out)])
        assert isinstance(done.exception, LaunchError)
        assert said in str(done.exception)
    assert list(tmp_path.iterdir()) == []


def test_what_a_run_reads_is_never_written_over(tmp_path: Path):
    for name in ("a.h5ad", "b.h5ad", "embedded.h5ad"):
        (tmp_path / name).write_bytes(b"raw data")
    data = DataConfig(input=tmp_path / "[ab].h5ad", embed_file=tmp_path / "embedded.h5ad")
    model = ModelConfig(embed_key="X")
    config = RunConfig(name="r", output_dir=tmp_path / "run", data=data, model=model)
    for name in ("b.h5ad", "embedded.h5ad"):
        with pytest.raises(LaunchError, match=r"is what this run reads"):
            refuse_input_as_output(config, tmp_path / name)
    refuse_input_as_output(config, tmp_path / "c.h5ad")
    store = config.model_copy(update={"data": DataConfig(input=tmp_path / "store")})
    with pytest.raises(LaunchError, match=r"is what this run reads"):
        refuse_input_as_output(store, tmp_path / "store" / "c.h5ad")
