"""Reading rows as they were written, and what is said of files that are not what they should be."""

from __future__ import annotations

import datetime
import gzip
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lte.data.config import DataConfig, read_documents
from tests.data.text_samples import write_jsonl


def read(path: Path, content: str | bytes, **options: Any) -> list[Any]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_documents(str(path), DataConfig(**options)))


def pairs(path: Path, content: str | bytes, **options: Any) -> list[tuple[str, str]]:
    return [(row["prompt"], row["completion"]) for row in read(path, content, kind="completion", **options)]


class TestTables:
    @pytest.mark.parametrize(
        ("content", "wanted"),
        [
            ("prompt,completion,from\na,b,c,\nd,e,f,\n", [("a", "b"), ("d", "e")]),
            ("prompt,completion,\na,b,\nd,e,\n", [("a", "b"), ("d", "e")]),
            ("prompt,completion\n1 + 1 =,2\n0.50,yes\n", [("1 + 1 =", "2"), ("0.50", "yes")]),
            ("prompt,completion\na,0\n007,2024-01-31\n", [("a", "0"), ("007", "2024-01-31")]),
            ("prompt,completion\nb,False\nc,None\nd,nan\n", [("b", "False"), ("c", "None"), ("d", "nan")]),
            ("\ufeffprompt,completion\r\na,b\r\n", [("a", "b")]),
            ('"prompt","completion"\n"a, ""b""","c\nd"\n', [('a, "b"', "c\nd")]),
            ("prompt;completion\na, b;c\n", [("a, b", "c")]),
            ("\n\nprompt;completion\n\na;b\n\n", [("a", "b")]),
            ("prompt\tcompletion\na, b\tc\n", [("a, b", "c")]),
            ("completion,x,prompt\nb,1,a\n", [("a", "b")]),
            ('prompt,completion\na,5" disk\n', [("a", '5" disk')]),
            ("x,x,prompt,completion\n1,2,a,b\n", [("a", "b")]),
        ],
    )
    def test_columns_go_by_name_and_values_are_text(self, tmp_path, content, wanted):
        assert pairs(tmp_path / "x.csv", content) == wanted

    def test_tabs_separate_tsv(self, tmp_path):
        assert pairs(tmp_path / "x.tsv", "prompt\tcompletion\na,b\t1\n") == [("a,b", "1")]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("text,n\na,1\nb,2,3\n", r"x.csv: line 3 has 3 values in 2 columns; mend"),
            ("text,n\na,1\nb\n", "line 3 has 1 values in 2 columns"),
            ("text\nhello, world\n", "line 2 has 2 values in 1 columns"),
            ('text,n\n"a,1\nb,2\n', "line 3: unexpected end of data"),
            ('text,n\n"a"b,1\n', "line 2: ',' expected after"),
            ("text,text\na,b\n", r"x.csv, line 2: the field 'text' must be there once, got several columns"),
            (b"text\nok\nna\xefve\n", r"line 3 \(byte 0xef\) is no UTF-8 text"),
            ("text\na\0b\n", "line 2 holds a NUL"),
            ("text\nabc\n".encode("utf-16-le"), "line 1 holds a NUL, as binary files and UTF-16 without a mark"),
            ("text\n", "at least one document, got none in"),
        ],
    )
    def test_rows_that_are_not_of_the_table_are_refused(self, tmp_path, content, message):
        with pytest.raises(ValueError, match=message):
            read(tmp_path / "x.csv", content)

    def test_long_values_have_no_limit(self, tmp_path):
        long = "word " * 60_000
        assert read(tmp_path / "x.csv", f"text\n{long}\n") == [long]


class TestJson:
    @pytest.mark.parametrize(
        ("content", "wanted"),
        [
            ('{"text": "a"}\r\n\r\n{"text": "b\\u2028c\u2028d"}\r\n', ["a", "b\u2028c\u2028d"]),
            ('\ufeff{"text": "a"}', ["a"]),
            ('[{"text": "a"},\n {"text": "b", "n": NaN}]', ["a", "b"]),
            ('["a", "b"]', ["a", "b"]),
            ('{\n "text": "a"\n}\n{\n "text": "b"\n}\n', ["a", "b"]),
            ('{"text": 3.0}\n{"text": 1.10}\n{"text": 1E5}\n{"text": -0.0}', ["3.0", "1.10", "1E5", "-0.0"]),
            ('{"text": 12345678901234567890123}\n{"text": true}', ["12345678901234567890123", "true"]),
            ('{"text": null}\n{"n": 1}\n{"text": "\\u0000a"}', ["\0a"]),
            ('{"text": "a", "n": 1}\n{"text": "b", "n": "x"}\n{"n": {"y": [1, "z"]}, "text": "c"}', ["a", "b", "c"]),
            ('{"text": "a\tb"}', ["a\tb"]),
        ],
    )
    def test_fields_are_what_is_written(self, tmp_path, content, wanted):
        assert read(tmp_path / "x.json", content) == wanted
        assert read(tmp_path / "x.jsonl", content) == wanted

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ('{"text": "a"}\n{"text": "b"\n', "line 3: Expecting ',' delimiter"),
            ('{"text": "a"}\n{"text" "b"}\n', "line 2: Expecting ':' delimiter"),
            ('[{"text": "a"}\n,\n{"text": "b"}', "the list does not end"),
            ('[{"text": "a"},]', "line 1: Expecting value"),
            ('[{"text": "a"} {"text": "a"}]', "a comma is missing after a value"),
            ('[{"text": "a"}] 3', "or has more text after it"),
            ('{"text": "a"}\n3\n', "line 2 must hold an object, got 3"),
            ('{"text": "a", "text": "b"}', "line 1: the key 'text' stands twice"),
            ('{"text": {"a": 1}}', "line 1: the field 'text' must hold text, got an object"),
            ('{"text": "a"}\n{"text": NaN}', "line 2: the field 'text' must hold text, got nan"),
            ('{"text": "\\ud800 a"}', r"must hold text, got half a surrogate pair, '\\ud800'"),
            ('{"text": ' * 100_000, "recursion"),
            ('{"text": %s}' % ("1" * 5000), "line 1: Exceeds the limit"),
            (b'{"text": "a"}\n{"text": "\xff"}', r"line 2 \(byte 0xff\) is no UTF-8 text"),
        ],
    )
    def test_what_is_no_row_is_refused_with_its_line(self, tmp_path, content, message):
        with pytest.raises(ValueError, match=message):
            read(tmp_path / "x.jsonl", content)


class TestFiles:
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
    def test_a_byte_order_mark_is_no_text(self, tmp_path, encoding):
        assert read(tmp_path / "x.txt", "é one\r\ntwo".encode(encoding)) == ["é one\ntwo"]
        assert read(tmp_path / "x.jsonl", '{"text": "é"}'.encode(encoding)) == ["é"]

    def test_a_packed_file_is_known_without_its_ending(self, tmp_path):
        assert read(tmp_path / "x.jsonl", gzip.compress(b'{"text": "a"}')) == ["a"]

    def test_a_changed_file_is_read_anew(self, tmp_path):
        path = tmp_path / "x.jsonl"
        assert read(path, '{"text": "one"}') == ["one"]
        before = path.stat()
        path.write_text('{"text": "two"}')
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert read_documents(str(path), DataConfig()) == ["two"]

    def test_columns_of_shards_may_differ_where_they_are_not_used(self, tmp_path):
        write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "meta": {"x": 1}}])
        write_jsonl(tmp_path / "b.jsonl", [{"text": "b", "meta": "none", "n": [1]}])
        pyarrow.parquet.write_table(pyarrow.table({"text": ["c"], "meta": [1.5]}), tmp_path / "c.parquet")
        (tmp_path / "d.csv").write_text("n,text\n1,d\n")
        found = read_documents(str(tmp_path / "*"), DataConfig())
        assert sorted(found) == ["a", "b", "c", "d"]
        assert found.columns.unused == {"meta", "n"}

    def test_parquet_of_other_types_is_text(self, tmp_path):
        path = tmp_path / "x.parquet"
        columns: dict[str, Any] = {
            "float": pyarrow.array([0.1, 3.0, None], pyarrow.float32()),
            "int": [1, 2, 3],
            "bool": [True, False, None],
            "day": [datetime.date(2024, 1, 31)] * 3,
            "bytes": ["é".encode(), b"a", b"b"],
        }
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        found = {name: list(read_documents(str(path), DataConfig(text_field=name))) for name in columns}
        assert found == {
            "float": ["0.1", "3.0"],
            "int": ["1", "2", "3"],
            "bool": ["true", "false"],
            "day": ["2024-01-31"] * 3,
            "bytes": ["é", "a", "b"],
        }
        pyarrow.parquet.write_table(pyarrow.table({"text": [b"\xff"]}), path)
        with pytest.raises(
            ValueError, match=r"x.parquet, row 1: the field 'text' must hold text, got bytes that are no"
        ):
            read_documents(str(path), DataConfig())

    def test_sources_of_two_kinds_are_refused(self, tmp_path):
        chats = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
        sources = [write_jsonl(tmp_path / "a.jsonl", chats), write_jsonl(tmp_path / "b.jsonl", [{"text": "b"}])]
        with pytest.raises(ValueError, match="data must be of one kind, got chat and text in"):
            read_documents(sources, DataConfig())
