"""The first signal is a notice; the second does what it did before."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.preemption import LeaveNote, hear_preemption


class EndedAtOnceError(Exception):
    pass


def end_at_once(signum, frame):
    raise EndedAtOnceError


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGUSR1], ids=["term", "usr1"])
def test_the_second_signal_ends_at_once(second: signal.Signals):
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, end_at_once) for number in numbers}
    try:
        with hear_preemption() as is_stop_asked:
            assert not is_stop_asked()
            os.kill(os.getpid(), signal.SIGTERM)
            assert is_stop_asked()
            with pytest.raises(EndedAtOnceError):
                os.kill(os.getpid(), second)
        with hear_preemption() as is_stop_asked:
            assert not is_stop_asked()
        assert all(signal.getsignal(number) is end_at_once for number in numbers)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_the_notice_is_passed_on_once_and_read_elsewhere(tmp_path: Path):
    path = tmp_path / "logs" / "leave.txt"
    here, elsewhere = LeaveNote(path), LeaveNote(path)
    assert not elsewhere.is_written()
    here.clear()
    inode = path.stat().st_ino
    before = {number: signal.signal(number, end_at_once) for number in (signal.SIGTERM,)}
    try:
        with hear_preemption(here.write) as is_stop_asked:
            assert not elsewhere.is_written()
            os.kill(os.getpid(), signal.SIGTERM)
            assert is_stop_asked()
            assert elsewhere.is_written()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    # A file that is replaced may be read as it was for as long as NFS remembers its name.
    assert path.stat().st_ino == inode
    here.clear()
    assert not elsewhere.is_written()


def test_storage_that_does_not_answer_asks_nothing(tmp_path: Path):
    assert not LeaveNote(tmp_path).is_written()


def test_a_notice_while_nothing_trains_is_an_interruption():
    """Unheard, SIGUSR1 would end the process at once, and nothing would be cancelled."""
    command = (
        "import os, signal, sys, time, launcher.doctor, launcher.cli\n"
        "def examine():\n"
        "    os.kill(os.getpid(), signal.SIGUSR1)\n"
        "    time.sleep(60)\n"
        "launcher.doctor.examine = examine\n"
        "sys.argv = ['statewide', 'doctor']\n"
        "launcher.cli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 130, done.stderr
    assert "interrupted. Run the same command again" in done.stderr


def test_a_note_that_cannot_be_written_ends_nothing(tmp_path: Path, caplog):
    LeaveNote(tmp_path / "gone" / "note").write()
    assert "cannot be asked to save and leave" in caplog.text
