"""Read and write split files: our ``splits.toml`` and the ``starter.toml`` that users own.

A starter file has the tables ``[datasets]``, ``[training]``, ``[zeroshot]`` (``"dataset.context"``
-> split) and ``[fewshot."dataset.context"]`` (split -> perturbations). Whatever is in it and
cannot be applied is an error: nothing is silently ignored.
"""

from __future__ import annotations

import logging
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from data_store.files import write_text_atomically
from data_store.hints import nearest, some
from data_store.schema import SPLIT_NAMES, SplitName, StoreError
