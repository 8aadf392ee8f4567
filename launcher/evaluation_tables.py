"""Write the tables of an evaluation as csv in cell-eval's layout and as Parquet."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet

from state.evaluate import Evaluation
from state.metrics.aggregate import is_absent


def write_table(path: Path, tables: Iterable[pa.Table]) -> None:
    """Write ``path`` (a csv) and its Parquet twin, from tables of the same columns in turn.

    An absent value is empty, NaN is ``nan``. Names are quoted where they must be.
    """
    with path.open("wb") as handle, ExitStack() as stack:
        writer: pa_parquet.ParquetWriter | None = None
        for table in tables:
            if writer is None:
                handle.write((",".join(table.column_names) + "\n").encode())
                twin = path.with_suffix(".parquet")
                opened = pa_parquet.ParquetWriter(twin, table.schema, compression="zstd")
                writer = stack.enter_context(opened)
            writer.write_table(table)
            try:
                content = _as_csv(table, quoting_style="none")
            except pa.ArrowInvalid:  # a name with a comma, quote or line break
                content = _as_csv(table, quoting_style="needed")
            handle.write(content)


def as_arrow(frame: pd.DataFrame) -> pa.Table:
    """Convert a table without absent values; NaN stays NaN."""
    return pa.Table.from_pandas(frame, preserve_index=False, nthreads=1)


def results_table(evaluation: Evaluation) -> pa.Table:
    """Return cell-eval's ``results.csv``: the perturbation and the profile's metrics."""
    frame = evaluation.per_perturbation
    columns = {"perturbation": pa.array(frame["perturbation"].tolist(), pa.string())}
    for name in evaluation.columns:
        columns[name] = pa.array(
            frame[name].to_numpy(dtype="float64"), mask=is_absent(frame, name), from_pandas=False
        )
    return pa.table(columns)


def _as_csv(table: pa.Table, *, quoting_style: str) -> memoryview:
    options = pa_csv.WriteOptions(include_header=False, quoting_style=quoting_style)
    sink = pa.BufferOutputStream()
    pa_csv.write_csv(table, sink, options)
    return memoryview(sink.getvalue())
