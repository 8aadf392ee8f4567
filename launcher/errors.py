"""Errors of the launcher."""

from __future__ import annotations

from data_store.schema import UserError

EXIT_TRY_AGAIN = 75
"""Exit code of a run that saved and left (EX_TEMPFAIL of sysexits.h): start it again."""


class Interrupted(BaseException):
    """The user or the scheduler asked this process to stop."""


class Preempted(Interrupted):
    """Training saved a checkpoint and left, because it was about to be ended."""


class LaunchError(UserError):
    """A run that cannot be started or continued as asked."""
