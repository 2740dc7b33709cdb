"""The page: its data against the records that it is made from, its size, and that text stays text."""

from __future__ import annotations

import base64
import json
import math
import random
import re
import zlib
from pathlib import Path
from typing import Any

import pytest

from lte.records import ResultRecord
from lte.report.inputs import Bench
from lte.report.points import find_tradeoffs
from lte.report.report_page import (
    MOST_STEPS,
    history_data,
    html_report,
    report_data,
    routing_data,
    write_html_report,
)
from tests.report.sample_benches import bench, bench_content, bench_row
from tests.report.sample_records import measurement, record
from tests.report.test_points import runs_of


def data_of(*records: ResultRecord, benches: tuple[Bench, ...] = ()) -> dict[str, Any]:
    data = report_data(find_tradeoffs(runs_of(*records)) if records else [], benches)
    return json.loads(json.dumps(data, allow_nan=False))


def test_points_are_means_over_seeds_beside_the_reference() -> None:
    seeds = [
        record(seed=seed, value=value, latency_ms=3.0 + seed, latency_dense_ms=4.0)
        for seed, value in ((0, 24.0), (1, 26.0))
    ]
    (tradeoff,) = data_of(record("dense"), *seeds)["comparisons"]
    dense, lte = tradeoff["points"]
    assert dense["is_dense"]
    assert dense["is_reference"]
    assert lte["is_main"]
    assert (lte["curve"], lte["target"], lte["lost"]) == ("lte", 0.5, 5.0)
    assert lte["value"] == {"mean": 25.0, "sd": pytest.approx(math.sqrt(2)), "n": 2}
    assert lte["costs"] == {"bytes": 0.75, "flops": 0.5, "sparsity": 0.5, "time": 0.875}
    assert dense["costs"] == {"bytes": 1.0, "flops": 1.0, "sparsity": 0.0, "time": None}
    assert tradeoff["fronts"] == {"bytes": [0, 1], "flops": [0, 1], "sparsity": [0, 1], "time": [1]}
    assert (tradeoff["goal"], tradeoff["rivals"]) == (0.5, [])
    assert tradeoff["metric"] == {"name": "perplexity", "higher_is_better": False, "decimals": 2}
    assert tradeoff["results"]["rows"][1][2] == "25.00 ± 1.41"
    header, *rows = tradeoff["csv"]
    assert [row[header.index("value")] for row in rows] == [20.0, 25.0]


def test_each_run_says_where_it_comes_from() -> None:
    facts = {"command": "lte eval x --seed 7", "config": {"train": {"eta": 0.5}}, "git_commit": "abc"}
    (tradeoff,) = data_of(record(seed=7, **facts))["comparisons"]
    (run,) = tradeoff["points"][0]["runs"]
    assert run["seed"] == 7
    assert run["value"] == 25.0
    assert run["hardware"] == "a CPU, 2 cores"
    assert run["versions"] == {"python": "3.11", "torch": "2.13"}
    assert {name: run[name] for name in facts} == facts
    assert run["source"]


def test_failed_runs_and_numbers_that_are_not_finite_are_null() -> None:
    odd = record(seed=1, latency_ms=math.nan, latency_dense_ms=1.0, config={"train": {"learning_rate": math.inf}})
    (tradeoff,) = data_of(odd, record("cats", value=math.nan, failure="out of memory"))["comparisons"]
    assert tradeoff["points"][0]["costs"]["time"] is None
    assert tradeoff["points"][0]["lost"] is None
    assert tradeoff["points"][0]["runs"][0]["config"] == {"train": {"learning_rate": None}}
    (failed,) = tradeoff["failed"]
    assert (failed["name"], failed["why"], failed["value"]) == ("cats", "out of memory", None)


def test_all_runs_may_have_failed() -> None:
    (tradeoff,) = data_of(record(value=None))["comparisons"]
    assert tradeoff["points"] == []
    assert tradeoff["results"]["rows"] == []
    assert [table["title"] for table in tradeoff["tables"]] == ["Failed runs"]


def test_nothing_at_all_is_a_page_too() -> None:
    data = data_of()
    assert (data["comparisons"], data["benches"], data["overview"]["rows"]) == ([], [], [])


def test_weights_that_are_left_out_are_no_neurons_that_are_skipped() -> None:
    (tradeoff,) = data_of(
        record("dense"), record("wanda", sparsity=0.0), record("lte", sparsity=0.0, bytes_per_token=4e6)
    )["comparisons"]
    costs = {point["method"]: point["costs"]["sparsity"] for point in tradeoff["points"]}
    assert costs == {"dense": 0.0, "wanda": None, "lte": 0.0}


def test_no_path_is_absolute() -> None:
    odd = {"command": "lte eval /home/me/runs/a --text=/data/x.txt", "model": "/srv/models/m.gguf"}
    odd |= {"config": {"file": "/tmp/b/c.json", "url": "https://example.org/a/b", "share": "tokens/s"}}
    data = json.dumps(data_of(record(**odd)), ensure_ascii=False)
    assert not re.search(r"/(home|data|srv|tmp)/", data)
    for part in ("lte eval …/a --text=…/x.txt", "…/m.gguf", "…/c.json", "https://example.org/a/b", "tokens/s"):
        assert part in data


def test_routing_counts_experts_and_keeps_the_histogram() -> None:
    found = routing_data(record(measurement=measurement().to_dict()))
    assert found is not None
    assert found["active_fraction"] == [0.5, 1.0]
    assert (found["experts"], found["dead"], found["always_on"]) == ([4, 4], [1, 0], [1, 4])
    assert found["histogram"] == [[2500] * 2 + [0] * 36 + [2500] * 2, [0] * 39 + [10000]]
    assert found["threshold"] == measurement().threshold


@pytest.mark.parametrize("held", [None, {}, {"active_fraction": []}, {"active_fraction": 0.5}, [0.5]])
def test_a_record_without_routers_has_no_routing(held: Any) -> None:
    assert routing_data(record(measurement=held)) is None


def test_active_fractions_alone_are_enough_for_layers() -> None:
    found = routing_data(record(measurement={"active_fraction": [0.25, None]}))
    assert found is not None
    assert found["active_fraction"] == [0.25, None]
    assert (found["histogram"], found["dead"]) == (None, None)


def test_a_long_history_keeps_its_ends() -> None:
    steps = list(range(0, 1000, 2))
    shares = [[step / 1000, 1.0] for step in steps]
    found = history_data(record(layer_history={"step": steps, "stage": [1] * 500, "active_fraction": shares}))
    assert found is not None
    assert len(found["step"]) == len(found["active_fraction"]) == MOST_STEPS
    assert (found["step"][0], found["step"][-1]) == (0, 998)
    assert found["active_fraction"][-1] == [0.998, 1.0]


@pytest.mark.parametrize("held", [None, [1], {}, {"step": [1, 2], "active_fraction": [[0.5]]}, {"step": [1]}])
def test_a_record_without_a_whole_history_has_none(held: Any) -> None:
    assert history_data(record(layer_history=held)) is None


def test_a_bench_file_becomes_groups_of_rows() -> None:
    (found,) = data_of(benches=(bench(),))["benches"]
    assert found["name"] == "tiny, bfloat16, int8 weights, 1 x GPU (tiny.json)"
    (group,) = found["latency"]
    assert group["title"].startswith("decoding step, batch 1: tiny")
    medians = [(row["provider"], row["is_dense"], row["sparsity"], row["median_ms"]) for row in group["rows"]]
    assert medians == [("dense eager", True, 0.0, 4.0), ("lte", False, 0.5, 3.0), ("lte", False, 0.8, 2.0)]
    settings = [{**row, "setting": f"{100 * float(row['setting']):g}%"} for row in bench_content()["break_even"]]
    assert found["break_even"] == settings
    assert found["union"] == bench_content()["union"]


def test_rows_of_a_provider_that_come_twice_are_told_apart() -> None:
    rows = [
        bench_row(provider, None, sparsity, 1.0, benchmark="prefill", tokens=16, batch=16, routing=routing)
        for provider, sparsity, routing in (
            ("dense eager", 0.0, None),
            ("lte masked", 0.0, "same"),
            ("lte masked", 0.5, "same"),
            ("lte masked", 0.5, "independent"),
            ("lte decode", 0.5, "same"),
        )
    ]
    data = data_of(benches=(bench(rows=rows, model=None, shape="llama2-7b"),))
    (group,) = data["benches"][0]["latency"]
    assert group["title"] == "FFN, 16 tokens: llama2-7b, bfloat16, int8 weights, 1 x GPU (tiny.json)"
    names = [(row["provider"], row["is_dense"]) for row in group["rows"]]
    same, independent = "lte masked, same routing", "lte masked, independent routing"
    assert names == [("dense eager", True), (same, False), (same, False), (independent, False), ("lte decode", False)]
    assert data["colours"] == {name: "dense" if name.startswith("dense") else "lte" for name, _ in names}


def test_prompts_of_a_model_are_no_ffn() -> None:
    rows = [
        bench_row("lte", "0.5", 0.5, 1.0, benchmark="prefill", tokens=64, scope="model"),
        bench_row("a", None, 0, 1),
    ]
    rows.append(bench_row("b", None, 0.0, 1.0, benchmark="other"))
    titles = [group["title"].split(":")[0] for group in data_of(benches=(bench(rows=rows),))["benches"][0]["latency"]]
    assert titles == ["prompt of 64 tokens", "decoding step, batch 1"]


def test_rows_of_a_batch_that_lack_a_field_are_left_out() -> None:
    (found,) = data_of(benches=(bench(break_even=[{"setting": "0.5"}], union="?"),))["benches"]
    assert (found["break_even"], found["union"]) == ([], [])


def test_the_papers_points_are_beside_ours() -> None:
    names = {"task": "wikitext103", "model": "LLaMA-7B"}
    points = [record("dense", **names, value=5.5), record(**names, value=6.5)]
    (tradeoff,) = data_of(*points)["comparisons"]
    shown = {(marker["label"], round(marker["lost"], 6)) for marker in tradeoff["paper"]}
    assert ("LTE (paper)", 0.45) in shown
    assert any(table["title"].startswith("The paper and ours") for table in tradeoff["tables"])


MARKUP = "</script><script>document.title='taken'</script><img src=x onerror=alert(1)>"


def page_of(*records: ResultRecord) -> str:
    return html_report(report_data(find_tradeoffs(runs_of(*records)), [bench()]))


def held_data(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="page-data">(.*?)</script>', page, re.DOTALL)
    assert found
    data = json.loads(found[1])
    data["benches"] = data["benches"] and json.loads(zlib.decompress(base64.b64decode(data["benches"])))
    data["comparisons"] = [
        json.loads(zlib.decompress(base64.b64decode(each["packed"]))) for each in data["comparisons"]
    ]
    return data


def many_runs(count: int, layers: int = 32, experts: int = 344) -> list[dict[str, Any]]:
    """Runs of the size of LLaMA-7B, four seeds to a point."""
    choose = random.Random(0)
    shares = [round(choose.random(), 3) for _ in range(experts)]
    measured = {
        "active_fraction": [choose.random() for _ in range(layers)],
        "expert_use": [shares] * layers,
        "score_histogram": [[choose.random() / 20 for _ in range(40)] for _ in range(layers)],
        "threshold": 0.5,
        "tokens": 1000,
    }
    config = {"train": {f"setting_{place}": choose.random() for place in range(80)}}
    return [
        record(
            f"method {place // 20}",
            seed=place % 4,
            value=20 + choose.random(),
            target_sparsity=0.1 + (place // 4 % 5) / 10,
            sparsity=0.1 + (place // 4 % 5) / 10 + choose.random() / 20,
            measurement=measured,
            config=config,
            command=f"lte eval {place}",
        )
        for place in range(count)
    ]


def test_text_from_files_is_no_markup() -> None:
    odd = {"task": MARKUP, "label": MARKUP, "command": MARKUP, "model": MARKUP, "hardware": MARKUP}
    page = page_of(record("dense", **{**odd, "label": None}), record(MARKUP, **odd))
    assert "<img src=x" not in page
    assert page.count("<script>document.title") == 0
    (tradeoff,) = held_data(page)["comparisons"]
    assert tradeoff["name"] == MARKUP
    assert tradeoff["points"][1]["runs"][0]["command"] == MARKUP


def test_200_runs_stay_below_3_megabytes() -> None:
    page = page_of(*many_runs(200))
    points = held_data(page)["comparisons"][0]["points"]
    assert sum(len(point["runs"]) for point in points) == 200
    assert len(page.encode()) < 3_000_000


def test_the_file_is_written_into_a_new_folder(tmp_path: Path) -> None:
    path = write_html_report(tmp_path / "new" / "report.html", find_tradeoffs(runs_of(record())))
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [each.name for each in path.parent.iterdir()] == ["report.html"]
