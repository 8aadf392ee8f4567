"""The order of the tests: the longest files first, so that none is left for the end."""

import pytest

_LONGEST_FIRST = ("ray", "chaos", "e2e")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_rank)


def _rank(item: pytest.Item) -> int:
    ranks = (rank for rank, name in enumerate(_LONGEST_FIRST) if item.get_closest_marker(name))
    return next(ranks, len(_LONGEST_FIRST))
