"""Parquet, Arrow and data sets of `datasets`: the texts of one column, without reading the others."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptlit.data.corpus.text import reading
from gptlit.data.corpus.values import no_such_column, text_in
from gptlit.errors import UserError

if TYPE_CHECKING:
    import pyarrow

ROWS = 1000  # rows read at a time
BUFFER_BYTES = 2**16  # of a Parquet column read at a time


def parquet_rows(path: Path, column: str, where: str) -> Iterator[str]:
    """Yield the texts of a column of a Parquet file, one batch of rows in memory at a time."""
    import pyarrow.parquet

    # Without both settings the column of a whole row group is read into memory at once.
    settings = {"buffer_size": BUFFER_BYTES, "pre_buffer": False}
    with reading(where, Exception), pyarrow.parquet.ParquetFile(path, **settings) as file:
        check_column(file.schema_arrow, column, where)
        yield from texts(file.iter_batches(ROWS, columns=[outer(file.schema_arrow, column)]), column, where)


def arrow_rows(path: Path, column: str, where: str) -> Iterator[str]:
    """Yield the texts of a column of an Arrow IPC file (Feather) or stream, memory-mapped."""
    import pyarrow.ipc

    with reading(where, Exception), pyarrow.memory_map(str(path)) as source:
        if source.read(6) == b"ARROW1":
            file = pyarrow.ipc.open_file(source)
            schema, batches = file.schema, (file.get_batch(i) for i in range(file.num_record_batches))
        else:
            source.seek(0)
            stream = pyarrow.ipc.open_stream(source)
            schema, batches = stream.schema, iter(stream)
        check_column(schema, column, where)
        name = outer(schema, column)
        yield from texts((batch.select([name]) for batch in batches), column, where)


def dataset_rows(dataset: Any, column: str, where: str) -> Iterator[str]:
    """Yield the texts of a column of a `datasets` table, which may arrive over the network meanwhile."""
    with reading(where, Exception):
        yield from texts(dataset.with_format("arrow").iter(batch_size=ROWS), column, where)


def check_column(schema: "pyarrow.Schema", column: str, where: str) -> None:
    """Check that a table has the column, and that it can hold texts.

    Raises:
        UserError: no such column, or numbers.
    """
    import pyarrow.types as types

    kind = kind_of(schema, column)
    if kind is None:
        raise no_such_column(column, where, names_in(schema))
    inner = kind.value_type if types.is_dictionary(kind) else kind
    readable = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    bytes_too = (types.is_binary, types.is_large_binary, types.is_binary_view)
    lists = (types.is_list, types.is_large_list)
    if not any(is_kind(inner) for is_kind in (*readable, *bytes_too, *lists)):
        raise UserError(f"{column!r} of {where} holds {kind}, not text: name another column", "text_column")


def outer(schema: "pyarrow.Schema", column: str) -> str:
    """Return the column of a table that holds a column: itself, or `data` for `data.text`."""
    return column if column in schema.names else column.partition(".")[0]


def kind_of(schema: "pyarrow.Schema", column: str) -> "pyarrow.DataType | None":
    """Return the type of a column, or of what it names inside of structs and lists of them; None if there is none."""
    import pyarrow.types as types

    name = outer(schema, column)
    if name not in schema.names:
        return None
    kind = schema.field(name).type
    for key in column.removeprefix(name).split(".")[1:]:
        kind = kind.value_type if types.is_list(kind) or types.is_large_list(kind) else kind
        if not types.is_struct(kind) or kind.get_field_index(key) < 0:
            return None
        kind = kind.field(key).type
    return kind


def names_in(fields: "Iterable[pyarrow.Field]", prefix: str = "") -> Iterator[str]:
    """Yield the names of columns, and of what structs hold: `data.text`."""
    import pyarrow.types as types

    for field in fields:
        if types.is_struct(field.type):
            yield from names_in(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def texts(tables: "Iterable[pyarrow.RecordBatch | pyarrow.Table]", column: str, where: str) -> Iterator[str]:
    """Yield the texts of a column, an empty one for a row without text.

    Raises:
        UserError: no such column, bytes that are not UTF-8, or values that are not text.
    """
    row, name = 0, ""
    for table in tables:
        if not name:
            check_column(table.schema, column, where)
            name = outer(table.schema, column)
        for value in table.column(name).to_pylist():
            row += 1
            if isinstance(value, bytes):
                try:
                    value = value.decode()
                except UnicodeDecodeError as error:
                    raise UserError(f"{column!r} of {where} is not UTF-8 in row {row:,}: {error.reason}") from error
            if not isinstance(value, str) or "\r" in value:
                value = text_in({name: value}, column, where, f"row {row:,}")
            yield value or ""
