"""Helpers of error messages: the nearest known name, lists of readable length, list or not."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def nearest(name: str, known: Iterable[str]) -> str:
    """End a sentence: with ``"; did you mean 'x'?"`` for the closest known name, or with a stop."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {match[0]!r}?" if match else "."


def some(names: Iterable[str], limit: int = 8) -> str:
    """List the first names and say how many more there are."""
    listed = list(names)
    rest = len(listed) - limit
    text = ", ".join(listed[:limit]) or "(none)"
    return f"{text} and {rest} more" if rest > 0 else text


def is_list_of_names(value: Any) -> bool:
    """Tell whether a value from a file is a list of texts."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
