"""Rankings over cells of two sets that express other genes."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.se_detection import main, score_together
from state.embedding.scores import DetectionAnswers


def found(expressed: list[int], decoded: list[float]) -> DetectionAnswers:
    return DetectionAnswers(
        decoded_SK=np.tile(np.array(decoded, np.float32), (3, 1)),
        is_expressed_SK=np.tile(np.array(expressed, dtype=bool), (3, 1)),
        level_S=np.ones(3, np.float32),
        frequency_K=np.array([0.9, 0.5, 0.1], np.float32),
    )


def test_a_ranking_that_knows_the_set_is_told_from_one_that_does_not():
    """The frequency over all is right for the first set and wrong for the second."""
    answers = [found([1, 1, 0], [3, 2, 1]), found([0, 0, 1], [0, 0, 9])]
    own = [np.array([1.0, 1.0, 0.0]), np.array([0.0, 0.0, 0.8])]
    scores = score_together(answers, own)
    assert {name: values["cells"] for name, values in scores.items()} == {
        "SE": 1.0,
        "frequency in all sets": 0.5,
        # 0.5, 0.5 and 0.4 over both sets.
        "mean frequency of the sets": 0.5,
        "frequency in the own set": 1.0,
    }
    # 3 + 3 + 3 expressed, which both rank above all others.
    assert scores["SE"]["pairs"] == scores["frequency in the own set"]["pairs"] == 1.0
    assert scores["frequency in all sets"]["pairs"] < 0.6


def test_input_that_cannot_be_used_is_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for arguments, message in (
        ([], "the following arguments are required: RUN"),
        ([str(tmp_path / "none")], str(tmp_path / "none")),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        printed = capsys.readouterr().err
        assert message in printed
        assert printed.splitlines()[-1].startswith("python -m benchmarks.se_detection: ")
