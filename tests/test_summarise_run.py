from __future__ import annotations

from pathlib import Path

from tests.summarise_run import summarise

JUNIT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite name="pytest" errors="1" failures="1" skipped="2" tests="8" time="3.5">
<testcase classname="tests.ops.test_a" name="test_one[1]" time="0.1" />
<testcase classname="tests.ops.test_a" name="test_one[2]" time="0.1" />
<testcase classname="tests.ops.test_a.TestCpu" name="test_two[1-x]"><skipped message="what runs on a CPU">at</skipped></testcase>
<testcase classname="tests.ops.test_a.TestCpu" name="test_two[2-x]"><skipped message="what runs on a CPU">at</skipped></testcase>
<testcase classname="tests.ops.test_b" name="test_three"><failure message="assert">trace</failure></testcase>
<testcase classname="tests.ops.test_b" name="test_four"><error message="setup">trace</error></testcase>
<testcase classname="tests.ops.test_b.TestAll" name="test_five" time="0.1" />
<testcase time="0.2" />
</testsuite></testsuites>
"""  # noqa: E501


def test_the_summary_of_a_run(tmp_path: Path) -> None:
    junit = tmp_path / "run.xml"
    junit.write_text(JUNIT)
    assert summarise(junit) == {
        "counts": {"passed": 3, "failed": 1, "errors": 1, "skipped": 2, "unfinished": 1},
        "seconds": 3.5,
        "failed": ["tests.ops.test_b::test_three", "tests.ops.test_b::test_four"],
        "skipped": {"what runs on a CPU": {"tests.ops.test_a.TestCpu::test_two": 2}},
        "passed_by_module": {"tests.ops.test_a": 2, "tests.ops.test_b": 1},
    }


def test_the_summary_of_several_runs(tmp_path: Path) -> None:
    junits = [tmp_path / "run_0.xml", tmp_path / "run_1.xml"]
    for junit in junits:
        junit.write_text(JUNIT)
    found = summarise(*junits)
    assert found["counts"] == {"passed": 6, "failed": 2, "errors": 2, "skipped": 4, "unfinished": 2}
    assert found["seconds"] == 7.0
    assert found["passed_by_module"] == {"tests.ops.test_a": 4, "tests.ops.test_b": 2}
