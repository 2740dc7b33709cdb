"""Rows of text files, tables and packed files as they were written; no type or column is inferred from values.

Every fault is one sentence with the file and the line or row.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import datetime
import decimal
import gzip
import io
import json
import lzma
import math
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

FORMATS = ("text", "jsonl", "json", "csv", "tsv", "parquet")
ENDINGS = {".txt": "text", ".md": "text", **{f".{name}": name for name in FORMATS}}
# What reading a damaged file raises. RecursionError is JSON that is nested too deeply.
UNREADABLE = (ValueError, StopIteration, OSError, EOFError, RecursionError, csv.Error, lzma.LZMAError, zlib.error)
# Rows of JSON whose keys are looked at for the names of the columns.
LOOKED_AT = 100


def _open_zst(path: Path) -> Any:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


OPENERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zst}
_MAGIC = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\0": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


@dataclass(frozen=True)
class Table:
    """Rows of a file or of a data set.

    Attributes:
        name: of the file or the data set.
        unit: what rows are counted in, line or row.
        columns: their names; of JSON those of the first rows.
        read: gives the number and the values of each row; columns that are not asked for may be left out.
    """

    name: str
    unit: str
    columns: list[str]
    read: Callable[[Collection[str]], Iterator[tuple[int, Row]]]


def open_table(path: str | Path, name: str, text_column: str = "text") -> Table:
    """The rows of a file.

    Args:
        path: of the file, which may be packed.
        name: one of `FORMATS`.
        text_column: what the one column of a text file is called, and that of a list of strings in JSON.

    Raises:
        ValueError: for a file that cannot be read as that; from `read`, too, which goes on reading.
    """
    path = Path(path)
    with _readable(path, name):
        if name == "parquet":
            return _parquet_table(path)
        if name == "text":
            rows: Iterator[tuple[int, Row]] = ((1, {text_column: text}) for text in _whole_texts(path))
            return Table(str(path), "row", [text_column], lambda _: _guarded(path, name, rows))
        if name in ("csv", "tsv"):
            rows = csv_rows(lines_of(path, newline=""), "\t" if name == "tsv" else None)
            columns = list(next(rows, (0, {}))[1])
            return Table(str(path), "line", columns, lambda _: _guarded(path, name, rows))
        rows = json_rows(lines_of(path), text_column)
        head = list(islice(rows, LOOKED_AT))
        columns = list(dict.fromkeys(key for _, row in head for key in row))
        return Table(str(path), "line", columns, lambda _: _guarded(path, name, chain(head, rows)))


def as_text(value: Any, name: str = "it") -> str | None:
    """A value as it was written: numbers of JSON with all their digits, true and false as in JSON; `None` is none.

    Args:
        value: of a field.
        name: what the message calls it.

    Raises:
        ValueError: for lists, objects, NaN, bytes that are no UTF-8, and text that is no valid Unicode.
    """
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{name} must hold text, got half a surrogate pair, {value[error.start]!r}") from None
        return value
    if value is None:
        return None
    if isinstance(value, Repeated):
        raise ValueError(f"{name} must be there once, got several columns of that name")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value) and not isinstance(value, _Written):
        raise ValueError(f"{name} must hold text, got {value}")
    if isinstance(value, int | float | decimal.Decimal | datetime.date | datetime.time):
        return str(value)
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise ValueError(f"{name} must hold text, got bytes that are no UTF-8") from None
    what = {"dict": "an object", "list": "a list"}.get(type(value).__name__, f"a {type(value).__name__}")
    raise ValueError(f"{name} must hold text, got {what} ({str(value)[:40]})")


class _Written(float):
    """A number of JSON that as text is what the file has: 1.10 stays that."""

    def __new__(cls, text: str) -> _Written:
        number = super().__new__(cls, text)
        number.text = text
        return number

    text: str

    def __str__(self) -> str:
        return self.text


# Lines.


def lines_of(path: Path, newline: str | None = None) -> Iterator[str]:
    """The lines of a text file, packed or not: UTF-8, or by its byte order mark UTF-16 or UTF-32.

    Args:
        path: of the file.
        newline: as for `open`.

    Raises:
        ValueError: for bytes that are no such text, with the line.
    """
    with closing(_unpacked(path)) as binary:
        start = binary.peek(4)[:4]
        encoding = next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8-sig")
        try:
            for number, line in enumerate(io.TextIOWrapper(binary, encoding, newline=newline), 1):
                if "\0" in line:
                    raise ValueError(f"line {number} holds a NUL, as binary files and UTF-16 without a mark do")
                yield line
        except UnicodeError as error:
            name = encoding.upper().removesuffix("-SIG")
            raise ValueError(f"{_place_of_fault(path, encoding)} is no {name} text") from error


def _place_of_fault(path: Path, encoding: str) -> str:
    if encoding == "utf-8-sig":
        with closing(_unpacked(path)) as binary:
            for number, line in enumerate(binary, 1):
                try:
                    line.decode()
                except UnicodeDecodeError as error:
                    return f"line {number} (byte 0x{line[error.start]:02x})"
    return "the file"


def _unpacked(path: Path) -> Any:
    """The bytes of a file, unpacked by its ending, or where that says nothing by how it begins."""
    if path.suffix in OPENERS:
        return OPENERS[path.suffix](path)
    with path.open("rb") as file:
        start = file.read(6)
    packing = next((ending for magic, ending in _MAGIC.items() if start.startswith(magic)), "")
    return OPENERS[packing](path) if packing and path.suffix != ".parquet" else path.open("rb")


@contextmanager
def _readable(path: Path, name: str) -> Iterator[None]:
    try:
        yield
    except UNREADABLE as error:
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"data must be readable as {name}, got {path}: {reason}; mend the file, or say format= if it is another one"
        ) from error


def _guarded(path: Path, name: str, rows: Iterable[Any]) -> Iterator[Any]:
    with _readable(path, name):
        yield from rows


def _whole_texts(path: Path) -> Iterator[str]:
    yield "".join(lines_of(path))


# Formats.


def csv_rows(
    lines: Iterator[str],
    delimiter: str | None = None,
    *,
    header: Sequence[str] | None = None,
    quoted: bool = True,
    cut_off: bool = False,
) -> Iterator[tuple[int, Row]]:
    """The rows of a table by line, first one of the names of the columns, each of which is its own value.

    A row with more values than there are columns is none of this table, unless these are empty: many programs end
    each row with a separator.

    Args:
        lines: with their ends.
        delimiter: between values; `None` takes what the header has, a comma, else a semicolon, else a tab.
        header: the names where the file has none.
        quoted: whether quotation marks around a value are no part of it.
        cut_off: whether rows may end early; their last values are then `None`.

    Raises:
        ValueError: for another number of values, or quotation marks that do not close, with the line.
    """
    # Python's limit is 128 KiB for a value; documents are longer.
    csv.field_size_limit((1 << 31) - 1)
    if delimiter is None:
        head = list(islice(lines, 1))
        while head and not head[-1].strip() and (following := next(lines, None)) is not None:
            head.append(following)
        delimiter = next((mark for mark in ",;\t" if mark in "".join(head)), ",")
        lines = chain(head, lines)
    quoting: Any = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=quoted)
    try:
        names = list(header) if header else next((row for row in reader if row), [])
        yield 0, dict(zip(names, names, strict=True))
        repeated = {name for name in names if names.count(name) > 1}
        for row in reader:
            if not row:
                continue
            if len(row) != len(names):
                if any(row[len(names) :]) or (len(row) < len(names) and not cut_off):
                    raise ValueError(f"line {reader.line_num} has {len(row)} values in {len(names)} columns")
                row = [*row, *[None] * (len(names) - len(row))]  # type: ignore[list-item]
            values = dict(zip(names, row, strict=False))
            yield reader.line_num, {**values, **dict.fromkeys(repeated, Repeated())} if repeated else values
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from error


class Repeated:
    """The value of a column whose name several columns have; only who uses it refuses it."""


def json_rows(lines: Iterator[str], text_column: str = "text") -> Iterator[tuple[int, Row]]:
    """The objects of JSON Lines, of one list, or written one after the other, each with the line that it begins in.

    Raises:
        ValueError: for what is no JSON, and values that are no objects, with the line.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        listed, fault = line.lstrip().startswith("["), None
        try:
            value = None if listed else _JSON.decode(line)
        except ValueError as error:
            fault = error
        # An object over several lines is one whose first line ends too early.
        if listed or (isinstance(fault, json.JSONDecodeError) and fault.pos >= len(line.rstrip())):
            yield from _json_values(number, "".join(chain([line], lines)), listed, text_column)
        elif fault is not None:
            raise _json_fault(number, fault)
        else:
            yield number, _as_row(value, number, text_column)


def _json_values(first: int, text: str, listed: bool, text_column: str) -> Iterator[tuple[int, Row]]:
    """The values of a list, or one after the other, in a text that begins in the line `first`."""
    line, counted = first, 0
    position = _skip(text, 0)
    after = ""
    if listed:
        position, after = _skip(text, position + 1), "["
    while position < len(text) and not (listed and text[position] == "]" and after != ","):
        line, counted = line + text.count("\n", counted, position), position
        if listed and after not in ("[", ","):
            raise _json_fault(line, "a comma is missing after a value of the list")
        try:
            value, position = _JSON.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise _json_fault(first + error.lineno - 1, error) from None
        except ValueError as error:
            raise _json_fault(line, error) from None
        yield line, _as_row(value, line, text_column)
        position, after = _skip(text, position), ""
        if listed and text[position : position + 1] == ",":
            position, after = _skip(text, position + 1), ","
    if listed and (position >= len(text) or _skip(text, position + 1) < len(text)):
        raise _json_fault(line, "the list does not end, or has more text after it")


def _skip(text: str, position: int) -> int:
    """The next position that is no white space."""
    return _WHITE.match(text, position).end()  # type: ignore[union-attr]


def _json_fault(line: int, reason: object) -> ValueError:
    reason = reason.msg if isinstance(reason, json.JSONDecodeError) else reason
    return ValueError(f"JSON parse error in line {line}: {reason}")


def _as_row(value: Any, line: int, text_column: str) -> Row:
    if isinstance(value, dict):
        return value
    if isinstance(value, str):
        return {text_column: value}
    raise ValueError(f"line {line} must hold an object, got {json.dumps(value)[:40]}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice in an object")
    return found


_WHITE = re.compile(r"[ \t\r\n]*")
# Not strict: line ends and tabs within strings are what they are.
_JSON = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_Written, strict=False)


def parse_json(text: str) -> Any:
    """What a JSON text holds, with the numbers as they are written.

    Raises:
        ValueError: for what is no JSON.
    """
    try:
        return _JSON.decode(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _parquet_table(path: Path) -> Table:
    import pyarrow.parquet

    packed = path.suffix in OPENERS
    with closing(_unpacked(path)) as binary:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(binary.read()) if packed else path)
    columns = file.schema_arrow.names

    def read(wanted: Collection[str]) -> Iterator[tuple[int, Row]]:
        names = [name for name in dict.fromkeys(columns) if name in wanted]
        return _guarded(path, "parquet", arrow_rows(file.iter_batches(1024, columns=names)))

    return Table(str(path), "row", columns, read)


def arrow_rows(batches: Iterable[Any]) -> Iterator[tuple[int, Row]]:
    """The rows of tables or record batches of Arrow, counted from 1.

    Arrow gives all objects of a column the keys of all others, with nulls: these go.
    """
    import numpy
    import pyarrow

    number = 0
    for batch in batches:
        names, repeated = batch.schema.names, {}
        columns = []
        for name, column in zip(names, batch.columns, strict=True):
            values = column.to_pylist()
            if pyarrow.types.is_float32(column.type) or pyarrow.types.is_float16(column.type):
                # 0.1, and not the nearest 64-bit number to what 32 bits hold of it.
                values = [value if value is None else float(str(numpy.float32(value))) for value in values]
            columns.append([_without_nulls(value) for value in values])
            if names.count(name) > 1:
                repeated[name] = Repeated()
        for row in zip(*columns, strict=True):
            number += 1
            yield number, {**dict(zip(names, row, strict=True)), **repeated}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_without_nulls(each) for each in value]
    return value
