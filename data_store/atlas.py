"""Join the files of an atlas: one gene list, one ``obs``, one ``var``.

``open_source`` is where preprocessing begins. Tested by
``pytest tests/unit/data_store/test_atlas.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import pandas as pd
from anndata.io import read_elem

from data_store.containers import open_anndata
from data_store.hints import some
from data_store.ingest import CountSource, SourceFile, inspect_file
from data_store.locate import find_files, label_files
from data_store.schema import GeneChoice, InputPath, StoreError

SOURCE_FILE = "source_file"
"""``obs`` column with the file of each cell, when an atlas has several."""

logger = logging.getLogger(__name__)


def open_source(
    location: InputPath, layer: str | None = None, genes: GeneChoice = "same"
) -> CountSource:
    """Inspect the files of an input and bring their genes to one list.

    Parameters
    ----------
    location
        An h5ad or zarr AnnData, a folder or glob of several, or a URL.
    layer
        Layer with the raw counts; None: ``X``.
    genes
        What to do where the gene lists of several files differ: refuse, take the genes that all
        have, or take all. A gene that a file lacks then counts as zero in its cells.

    Raises
    ------
    StoreError
        If a file cannot be used, a gene name occurs twice in one, or the lists differ and may not.
    """
    files = [inspect_file(path, layer) for path in find_files(location)]
    names = [_read_gene_names(file) for file in files]
    common = _choose_genes(files, names, genes)
    mapped = [_map_genes(file, own, common) for file, own in zip(files, names, strict=True)]
    return CountSource(tuple(mapped), common)


def _read_gene_names(file: SourceFile) -> pd.Index:
    var = _read_file_table(file, "var")
    check_gene_names(var, file)
    return var.index.astype(str)


def check_gene_names(var: pd.DataFrame, file: SourceFile) -> None:
    """Check the gene names, the index of ``var``.

    Raises
    ------
    StoreError
        If a name occurs twice.
    """
    repeated = var.index[var.index.duplicated()].unique()
    if not len(repeated):
        return
    unique = [str(name) for name in var.columns if var[name].is_unique and var[name].dtype == "O"]
    other = f", or name them by a column without repeats ({some(unique)})" if unique else ""
    raise StoreError(
        f"{len(repeated)} gene names of {file.name} occur more than once: "
        f"{some(str(name) for name in repeated)}. "
        f"Make them unique: adata.var_names_make_unique(){other}; then write the file again"
    )


def _choose_genes(
    files: Sequence[SourceFile], names: Sequence[pd.Index], genes: GeneChoice
) -> tuple[str, ...]:
    union = names[0].append(list(names[1:])).unique()
    common = names[0]
    for own in names[1:]:
        common = common[common.isin(own)]
    if len(union) == len(common):
        if any(not own.equals(names[0]) for own in names[1:]):
            logger.warning(
                "the %d files have the same %d genes in different orders: matched by name",
                len(files),
                len(union),
            )
        return tuple(common)
    if genes == "same":
        raise StoreError(_differing_genes(files, names, len(common), len(union)))
    if not len(common) and genes == "intersection":
        raise StoreError(
            "the input files have no gene in common (data.genes = 'intersection'): "
            + "; ".join(
                f"{file.name}: {some(own, 3)}" for file, own in zip(files, names, strict=True)
            )
        )
    kept = union if genes == "union" else common
    logger.warning(
        "%s of the genes of %d files: %d genes; %s",
        genes,
        len(files),
        len(kept),
        f"{len(union) - len(common)} of them are absent from some file and count as 0 there"
        if genes == "union"
        else f"{len(union) - len(common)} that some file lacks are left out",
    )
    return tuple(kept)


def _differing_genes(
    files: Sequence[SourceFile], names: Sequence[pd.Index], num_common: int, num_union: int
) -> str:
    odd = next(place for place, own in enumerate(names) if set(own) != set(names[0]))
    first, other = names[0], names[odd]
    only = [
        f"{len(own)} only in {file.name} ({some(own, 3)})"
        for file, own in (
            (files[0], first[~first.isin(other)]),
            (files[odd], other[~other.isin(first)]),
        )
        if len(own)
    ]
    return (
        f"the gene lists of the {len(files)} input files differ: {'; '.join(only)}. "
        f"Set data.genes = 'intersection' ({num_common} genes that all files have) or 'union' "
        f"({num_union} genes, 0 where a file lacks one), or --genes on the command line"
    )


def _map_genes(file: SourceFile, own: pd.Index, common: tuple[str, ...]) -> SourceFile:
    if tuple(own) == common:
        return file
    return replace(file, gene_map=pd.Index(common).get_indexer(own).astype(np.int32))


def read_table(
    source: CountSource, name: Literal["obs", "var"], used: Sequence[tuple[str, str]] = ()
) -> pd.DataFrame:
    """Read ``obs`` or ``var`` of an atlas, index included.

    ``obs`` of several files are put one below the other, with a column ``source_file``; cells of
    the same name in two files get the file's name added. ``var`` keeps the columns in which all
    files agree.

    Parameters
    ----------
    source
        The atlas.
    name
        The table.
    used
        Columns that every file must have if one has them, as (name, setting). What no file has
        is left to its reader.

    Raises
    ------
    StoreError
        If a table cannot be read, its length is not that of the matrix, or some files lack a
        column that is used.
    """
    tables = [_read_file_table(file, name) for file in source.files]
    _require_everywhere(tables, source, used)
    if name == "var":
        return _join_var(tables, source)
    return tables[0] if len(tables) == 1 else _stack_obs(tables, source)


def _read_file_table(file: SourceFile, name: Literal["obs", "var"]) -> pd.DataFrame:
    with open_anndata(file.location) as group:
        try:
            table = read_elem(group[name])
        except (KeyError, ValueError, TypeError, OSError) as error:
            raise StoreError(f"{name} of {file.name} cannot be read: {error}") from error
    size = file.num_cells if name == "obs" else file.num_genes
    if len(table) != size:
        raise StoreError(
            f"{name} of {file.name} has {len(table)} rows, but {file.matrix} has {size}: "
            "the file is damaged"
        )
    return table


def _join_var(tables: Sequence[pd.DataFrame], source: CountSource) -> pd.DataFrame:
    genes = pd.Index(source.genes, name=tables[0].index.name)
    if len(tables) == 1:
        return tables[0]
    joined = pd.DataFrame(index=genes)
    shared = [name for name in tables[0] if all(name in table for table in tables[1:])]
    dropped = sorted({str(name) for table in tables for name in table} - set(map(str, shared)))
    for name in shared:
        columns = [table[name].astype(object).reindex(genes) for table in tables]
        values = columns[0]
        for other in columns[1:]:
            values = values.where(values.notna(), other)
        if all(((column == values) | column.isna()).all() for column in columns):
            joined[name] = values.infer_objects()
        else:
            dropped.append(str(name))
    if dropped:
        logger.warning("var columns in which the files differ are left out: %s", some(dropped))
    return joined


def _stack_obs(tables: Sequence[pd.DataFrame], source: CountSource) -> pd.DataFrame:
    labels = label_files([file.location for file in source.files])
    columns = list(dict.fromkeys(str(name) for table in tables for name in table))
    names = [table.index.astype(str) for table in tables]
    index = names[0].append(names[1:])
    if len(index.unique()) < sum(len(own.unique()) for own in names):
        logger.warning("files share cell names: the name of the file is added to each")
        stems = [label.rpartition(".")[0] for label in labels]
        index = pd.Index(
            [f"{cell}-{stem}" for own, stem in zip(names, stems, strict=True) for cell in own]
        )
    sizes = [len(table) for table in tables]
    codes = np.repeat(np.arange(len(labels)), sizes)
    stacked = {name: _stack_column(tables, name, index) for name in columns}
    if SOURCE_FILE in stacked:
        raise StoreError(
            f"obs of the input files has a column {SOURCE_FILE!r}, a name the store needs for its "
            f"own; rename it: adata.obs = adata.obs.rename(columns={{'{SOURCE_FILE}': 'old'}})"
        )
    stacked[SOURCE_FILE] = pd.Series(pd.Categorical.from_codes(codes, list(labels)), index=index)
    return pd.DataFrame(stacked, index=index)


def _stack_column(tables: Sequence[pd.DataFrame], name: str, index: pd.Index) -> pd.Series:
    """Put a column of several files one below the other, in a type that anndata can write."""
    parts = [
        table[name] if name in table else pd.Series(pd.NA, index=table.index, dtype=object)
        for table in tables
    ]
    present = [table[name] for table in tables if name in table]
    values: pd.Series
    if all(pd.api.types.is_bool_dtype(part.dtype) for part in present):
        is_whole = len(present) == len(tables)
        values = pd.concat([part.astype("boolean") for part in parts])
        values = values.astype(bool) if is_whole and not values.isna().any() else values
    elif all(pd.api.types.is_numeric_dtype(part.dtype) for part in present):
        # A gap makes the column float; a bool among numbers would make it object.
        numbers = [
            part.astype(int) if pd.api.types.is_bool_dtype(part.dtype) else part
            for part in (table.get(name, pd.Series(np.nan, table.index)) for table in tables)
        ]
        values = pd.concat(numbers)
    else:
        texts = [part.astype(object).map(str, na_action="ignore") for part in parts]
        values = pd.concat(texts).astype("category")
    values.index = index
    return values


def _require_everywhere(
    tables: Sequence[pd.DataFrame], source: CountSource, used: Sequence[tuple[str, str]]
) -> None:
    for name, key in used:
        pairs = zip(source.files, tables, strict=True)
        lacking = [file.name for file, table in pairs if name not in table]
        if 0 < len(lacking) < len(tables):
            raise StoreError(
                f"obs column {name!r} ({key}) is not in {some(lacking, 3)}, but in "
                f"{len(tables) - len(lacking)} other input files; add it there, or leave the "
                "file out (data.input)"
            )
