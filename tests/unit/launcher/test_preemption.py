"""The first signal is a notice; the second does what it did before."""

import os
import signal

import pytest

from launcher.preemption import hear_preemption


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
