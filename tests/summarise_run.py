"""Turns JUnit files of pytest into a result file: what ran, what was left out and why, and on what.

python -m pytest tests/ops --junit-xml=run.xml
python -m tests.summarise_run results/gpu_tests.json run.xml --command "python -m pytest tests/ops"
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from lte.files import write_json_atomic
from lte.records import environment

OUTCOMES = {"failure": "failed", "error": "errors", "skipped": "skipped"}  # by pytest's tags


def summarise(*junits: Path) -> dict[str, Any]:
    """Counts by outcome and by module over all files, and the names of the tests that failed or were skipped.

    Skipped tests stand under their reason, the cases of one test together with their number.

    Raises:
        ValueError: if a file holds no test suite.
    """
    suites = [_suite(junit) for junit in junits]
    outcomes, modules = Counter[str](), Counter[str]()
    failed: list[str] = []
    skipped: dict[str, Counter[str]] = {}
    for case in (case for suite in suites for case in suite.iter("testcase")):
        if not case.get("name"):  # under way when the run was interrupted
            outcomes["unfinished"] += 1
            continue
        name = f"{case.get('classname')}::{case.get('name')}"
        outcome = next((OUTCOMES[child.tag] for child in case if child.tag in OUTCOMES), "passed")
        outcomes[outcome] += 1
        if outcome == "passed":
            modules[str(case.get("classname")).partition(".Test")[0]] += 1
        elif outcome == "skipped":
            reason = str(case.find("skipped").get("message"))  # type: ignore[union-attr]
            skipped.setdefault(reason, Counter())[name.partition("[")[0]] += 1
        else:
            failed.append(name)
    return {
        "counts": {outcome: outcomes[outcome] for outcome in ("passed", *OUTCOMES.values(), "unfinished")},
        "seconds": sum(float(suite.get("time", "nan")) for suite in suites),
        "failed": failed,
        "skipped": skipped,
        "passed_by_module": modules,
    }


def _suite(junit: Path) -> ElementTree.Element:
    suite = ElementTree.parse(junit).getroot().find("testsuite")
    if suite is None:
        raise ValueError(f"junit must hold a test suite, got none in {junit}")
    return suite


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("junit", type=Path, nargs="+")
    parser.add_argument("--command", help="what was run, for the file")
    args = parser.parse_args()
    found = {"command": args.command, **environment(), **summarise(*args.junit)}
    write_json_atomic(args.output, found)
    print({"counts": found["counts"], "failed": found["failed"]})


if __name__ == "__main__":
    main()
