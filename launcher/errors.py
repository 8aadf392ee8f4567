"""Errors of the launcher."""

from __future__ import annotations

from data_store.schema import UserError


class LaunchError(UserError):
    """A run that cannot be started or continued as asked."""
