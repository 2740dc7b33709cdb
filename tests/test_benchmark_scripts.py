"""What the benchmark scripts take for granted of the code that they measure, without a GPU."""

from __future__ import annotations

import contextlib
import functools
import gzip
import importlib.machinery
import itertools
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import textwrap
import time
import types
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lte
from lte.bench import timing
from lte.bench.bytes import router_bytes
from lte.bench.gate import GateError
from lte.bench.models import model_pair
from lte.bench.routing import Use, active_count
from lte.bench.rows import REQUIRED_FIELDS
from lte.bench.shapes import shape_config
from lte.eval.flops import meta_model
from lte.eval.models import load_any_model
from lte.eval.speculation import PassClock
from lte.eval.token_routing import recorded_logits
from lte.hf.dense import load_tokenizer
from lte.hf.threshold import set_threshold_
from lte.nn.wrapped_ffn import numbers_in_4_bits
from lte.ops.reference import active_experts, sparse_ffn_reference
from lte.ops.step import engines
from lte.records import environment, read_json
from lte.report.inputs import load_inputs
from lte.runs.conversion import convert_folder
from lte.train import adapters
from lte.train.config import TrainConfig
from tests.cli.conftest import save_tiny_model
from tests.hf.gguf_files import tiny_llama, train_tokenizer, write_gguf
from tests.hf.step_models import take_reference_engines
from tests.ops.test_lookup_kernels import match_of
from tests.tiny_models import randomise_routers_, tiny_dense_model

SCRIPTS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*.py")), ids=lambda path: path.stem)
def test_every_script_can_be_imported(script: Any, path: Path) -> None:
    assert script(path.stem).__doc__


def test_the_stamps_of_the_trace_find_their_places(script: Any, tmp_path: Path) -> None:
    kernel = script("decode_trace").traced_kernel(tmp_path)
    source = (tmp_path / "traced_kernel.py").read_text()
    assert kernel.arg_names[:2] == ["trace", "x"]
    assert [f"stamp(trace, {slot})" in source for slot in range(8)] == [True] * 8


def test_every_row_of_a_file_says_where_it_was_measured(script: Any, tmp_path: Path) -> None:
    rows = script("ffn_rows")
    row = rows.row("prefill", "lte masked", 4, 0.5, [1.0, 2.0, 3.0], 1000)
    rows.write_rows(tmp_path / "rows.json", [row], shape="llama2-7b")
    rows.write_rows(None, [row])
    (bench,) = load_inputs([tmp_path / "rows.json"]).benches
    assert bench.content["shape"] == "llama2-7b"
    assert bench.content["rows"] == [{**row, **environment()}]


def test_the_bytes_of_a_decoding_step(script: Any) -> None:
    decode_step, pair = script("decode_step"), model_pair(tiny_dense_model())
    dense, ffn = pair.dense_ffns, pair.sparse_ffns[0]
    matrices = sum(p.nbytes for p in dense[0].parameters() if p.ndim == 2)
    size = decode_step.step_bytes
    assert size(pair, 0.0) - size(pair, None) == len(dense) * router_bytes(ffn)
    needed = active_count(ffn.num_experts, 0.5) / ffn.num_experts
    assert size(pair, 0.0) - size(pair, 0.5) == pytest.approx(len(dense) * (1 - needed) * matrices, abs=1)
    assert size(pair, None) > sum(p.nbytes for p in pair.dense.model.layers.parameters())


@pytest.mark.parametrize("name", ["prefill.json", "prefill_few_tokens.json", "decode_step.json"])
def test_tracked_rows_say_where_they_were_measured(name: str) -> None:
    content = read_json(SCRIPTS.parent / "results" / name)
    for row in content["rows"]:
        assert set(REQUIRED_FIELDS) <= set(row)
        assert all(row[field] == content[field] for field in ("hardware", "versions", "git_commit"))


class TestCpuStep:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        tokenizer = train_tokenizer()
        model = tiny_llama(tokenizer.get_vocab_size(), max_position_embeddings=256)
        return write_gguf(tmp_path / "model.gguf", model, tokenizer)

    def test_a_gguf_file_in_another_format_holds_the_same_weights(self, script: Any, file: Path) -> None:
        copy = file.with_name("copy.gguf")
        script("cpu_step").write_gguf(file, copy, "bfloat16")
        assert copy.stat().st_size < 0.8 * file.stat().st_size
        found, expected = (load_any_model(str(path), "bfloat16").state_dict() for path in (copy, file))
        assert all(torch.equal(found[name], weight) for name, weight in expected.items())

    def test_rows_of_ours_and_of_llama_cpp(
        self, script: Any, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Server:
            def __init__(self, params: Any):
                assert params.cpuparams.n_threads == 1
                assert Path(params.model.path).is_file()

            def handle_completions(self, request: dict[str, Any]) -> dict[str, Any]:
                assert len(request["prompt"]) == 64
                return {"timings": {"predicted_per_token_ms": 2.5}}

        package = types.ModuleType("xllamacpp")
        package.__spec__ = importlib.machinery.ModuleSpec("xllamacpp", None)
        parameters = SimpleNamespace(
            model=SimpleNamespace(), cpuparams=SimpleNamespace(), cpuparams_batch=SimpleNamespace()
        )
        package.CommonParams, package.Server = lambda: parameters, Server  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "xllamacpp", package)
        monkeypatch.setattr(timing, "SWEEP_BYTES", 1 << 12)
        flags = ["--threads", "1", "--repeats", "1", "--sparsities", "0.5"]
        script("cpu_step").main(["--smollm2", str(file), "--output", str(tmp_path / "out"), *flags])
        rows = {row["provider"]: row for row in read_json(tmp_path / "out_smollm2_135m.json")["rows"]}
        assert list(rows)[-1] == "llama.cpp"
        assert set(rows) >= {"dense eager", "lte eager", "llama.cpp"}
        assert rows["llama.cpp"]["median_ms"] == 2.5
        assert rows["llama.cpp"]["ratio_to_dense"] == 2.5 / rows["dense eager"]["median_ms"]
        assert load_inputs([tmp_path / "out_smollm2_135m.json"]).benches


def save_sparse_model(place: Path, routed: bool = True) -> str:
    """A tiny LTE model and its tokenizer in a folder below `place`; with `routed` its routers are random."""
    folder, sparse = str(save_tiny_model(place / "dense")), place / "sparse"
    model = lte.sparsify_(load_any_model(folder), lte.LteConfig(expert_size=8, grouping="random"))
    (randomise_routers_(model) if routed else model).save_pretrained(sparse)
    load_tokenizer(folder).save_pretrained(sparse)
    return str(sparse)


class TestRecordedRouting:
    def test_the_routers_of_other_widths_choose_by_the_masks(self, script: Any) -> None:
        module = script("prefill_layers")
        layers = module.Layers(module.Widths(hidden=256, neurons=32 * 20), "cpu")
        masks = [torch.rand(5, 12) < share for share in (0.3, 0.8)]
        layers.follow(masks)
        assert len(layers.states) == len(layers.routings) == 2
        for mask, x, routing in zip(masks, layers.states, layers.routings, strict=True):
            active = active_experts(x, routing)
            assert active.shape == (5, 20)
            assert torch.equal(active[:, [0, 10]], mask[:, [0, 6]])
        # Columns 0, 0, 1, 1, 2 of the masks.
        layers.follow(masks, core=3)
        assert [routing.core for routing in layers.routings] == [5, 5]
        layers.follow([torch.rand(5, 40) < 0.5])
        assert active_experts(layers.x, layers.routings[0]).shape == (5, 20)

    def test_draws_take_tokens_in_a_row_of_all_layers(self, script: Any) -> None:
        masks = [torch.arange(8)[:, None] + 100 * layer for layer in range(5)]
        found = list(script("recorded_routing").draws(masks, 3, 2))
        assert [int(mask[0]) // 100 for drawn in found for mask in drawn] == [0, 1, 2, 3, 4, 0]
        assert all((mask.diff(dim=0) == 1).all() and len(mask) == 3 for drawn in found for mask in drawn)

    def test_or_tokens_apart(self, script: Any) -> None:
        masks = [torch.arange(500)[:, None] + 1000 * layer for layer in range(3)]
        (drawn,) = script("recorded_routing").draws(masks, 4, 3, apart=True)
        assert [(mask // 1000).flatten().tolist() for mask in drawn] == [[layer] * 4 for layer in range(3)]
        assert all((mask.diff(dim=0) != 1).any() and len(mask.unique()) == 4 for mask in drawn)

    def test_rows_of_a_trained_model(self, script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        module, prefill = script("recorded_routing"), script("prefill")

        def paths(layers: Any, tokens: int) -> dict[str, Any]:
            def run(i: int) -> Any:
                return sparse_ffn_reference(layers.states[i], layers.ffns[i], layers.routings[i], "silu")

            return {name: run for name in prefill.paths(layers, tokens)}

        monkeypatch.setattr(module, "paths", paths)
        monkeypatch.setattr(module, "architecture", lambda device: 90)
        monkeypatch.setattr(module, "graph_times", lambda run, repeats, count: [float(len(run(count - 1)))] * repeats)
        monkeypatch.setattr(prefill, "dense_times", lambda *args, repeats, **kinds: {"dense eager": [4.0] * repeats})
        monkeypatch.setattr(module, "Layers", functools.partial(script("prefill_layers").Layers, device="cpu"))
        flags = ["--shapes", "tiny", "--tokens", "1", "4", "20", "--output", str(tmp_path / "rows.json")]
        module.main([save_sparse_model(tmp_path), *flags])
        rows = [each for each in read_json(tmp_path / "rows.json")["rows"] if each["provider"] != "dense eager"]
        assert [(each["tokens"], each["provider"]) for each in rows] == [
            (tokens, f"lte {name}")
            for tokens, names in ((1, ("masked", "decode")), (4, ("masked", "decode")), (20, ("masked", "grouped")))
            for name in names
        ]
        assert [each["ratio_to_dense"] for each in rows] == [0.25, 0.25, 1, 1, 5, 5]
        assert all(0 < each["active_fraction"] <= each["union"] <= 1 for each in rows)
        assert [sum(each["chosen"] for each in rows[i : i + 2]) for i in (0, 2, 4)] == [1, 1, 1]
        module.main([save_sparse_model(tmp_path), *flags, "--apart"])
        assert read_json(tmp_path / "rows.json")["apart"] is True

    def test_the_chosen_path_is_that_of_the_measured_union(self, script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        module, widths = script("recorded_routing"), script("prefill_layers").Widths.of("llama2-7b")
        monkeypatch.setattr(module, "architecture", lambda device: 90)
        for union, chosen in ((0.6, "decode"), (0.83, "masked")):
            for name in ("decode", "masked"):
                row = module.path_row(widths, name, 8, Use(active=0.2, union=union), [1.0], 0.1)
                assert row["chosen"] == (name == chosen)


class TestCompanyFigure:
    def test_the_figure_of_the_committed_records(self, tmp_path: Path) -> None:
        root = Path(__file__).parents[1]
        script = runpy.run_path(str(root / "experiments" / "company_figure.py"))
        records = script["load_records"](root / "results" / "recipe" / "company")
        best = next(each for each in records if each.label == "core-10-and-union-0.3" and each.target_sparsity == 0.8)
        assert script["shared"](best, 8) == pytest.approx(0.609, abs=5e-4)
        assert script["shared"](best, 1) == pytest.approx(0.81, abs=0.01)
        figure, axis = script["new_figure"](4, 4)
        many = {str(index): [best] for index in range(12)}
        script["draw_tokens"](axis, many, script["colour_names"](many))
        assert len(axis.lines) == 12
        script["save_figure"](figure, tmp_path / "figure.png")
        assert (tmp_path / "figure.png").stat().st_size


class TestStepTokens:
    def test_whole_steps_write_what_plain_decoding_does(
        self, script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module, made = script("step_tokens"), take_reference_engines(monkeypatch)
        flags = ["--prompts", "3", "--prompt-length", "8", "--tokens", "6", "--batch", "2"]
        module.main([save_sparse_model(tmp_path), *flags, "--output", str(tmp_path / "tokens.json")])
        found = read_json(tmp_path / "tokens.json")
        assert {plan.embedding.dtype for plan in made} == {torch.float32, torch.bfloat16}
        assert (found["float32"]["equal_answers"], found["float32"]["answers"], found["float32"]["causes"]) == (
            3,
            3,
            [],
        )
        assert found["float32"]["logits_relative_rms_max"] <= 1e-5
        assert found["dense_bfloat16_compiled"]["equal_answers"] == 3

    def test_a_difference_is_traced(self, script: Any, tmp_path: Path) -> None:
        module, model = script("step_tokens"), load_any_model(save_sparse_model(tmp_path))
        prompts = torch.arange(3, 19).view(2, 8)
        tokens, logits = module.answers(model, prompts, 2, 4)
        other = tokens.clone()
        other[1, 2] += 1
        places = module.compare((other, logits), (tokens, logits))["first_differences"]
        assert places == [None, 2]
        (cause,) = module.causes(model, prompts, (tokens, logits), places)
        assert cause["token"] == 2
        first, second = logits[1][2].topk(2).values.tolist()
        assert cause["logits_gap"] == first - second
        assert not cause["traced"]


class TestRoundedSteps:
    def test_rows_of_each_format(self, script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("torchao")
        module, made = script("rounded_steps"), take_reference_engines(monkeypatch)
        folder = save_sparse_model(tmp_path)
        flags = [
            "--weights",
            "native",
            "int8",
            "int4-32",
            "--batches",
            "1",
            "2",
            "--dtype",
            "float32",
            "--context",
            "24",
        ]
        flags += ["--prompt-length", "8", "--repeats", "2", "--output", str(tmp_path / "rows.json")]
        module.main([folder, *flags])
        rows = read_json(tmp_path / "rows.json")["rows"]
        assert len(rows) == 3 * 2 * 3
        assert all(row["median_ms"] > 0 and "note" not in row for row in rows)
        for row in rows:
            assert (row["sparsity"] > 0.2) == (row["provider"] == module.LTE_STEP)
        sizes = [row["bytes_per_weight"] for row in rows[::6]]
        assert sizes == sorted(sizes, reverse=True)
        assert {type(plan.head).__name__ for plan in made} == {"Tensor", "Quantized"}
        assert {plan.layers[0].router is None for plan in made} == {True, False}

    def test_what_cannot_run_has_a_note(self, script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(engines, "unfit", lambda plan, caches: "it is Monday")
        folder = save_sparse_model(tmp_path, routed=False)
        flags = [
            "--weights",
            "native",
            "--batches",
            "1",
            "--dtype",
            "float32",
            "--context",
            "16",
            "--prompt-length",
            "8",
        ]
        module = script("rounded_steps")
        with pytest.warns(RuntimeWarning, match="it is Monday"):
            module.main([folder, *flags, "--repeats", "2", "--output", str(tmp_path / "rows.json")])
        rows = read_json(tmp_path / "rows.json")["rows"]
        assert [row.get("note") for row in rows] == ["NoPlanError: it is Monday"] * 2 + [None]


class TestTrainingSpeed:
    FLAGS = (
        *["--shape", "tiny", "--batch", "2", "--length", "32", "--steps", "4", "--warm-up", "1", "--expert-size", "16"],
        *["--optim", "adamw_torch", "--lora-rank", "4", "--teacher"],
    )

    @pytest.mark.slow
    def test_each_training_has_a_row_for_each_stage_with_and_without_lte(self, script: Any, tmp_path: Path) -> None:
        pytest.importorskip("bitsandbytes")
        module, output = script("training_speed"), tmp_path / "rows.json"
        module.main([*self.FLAGS, "--output", str(output)])
        content = read_json(output)
        assert {"git_commit", "hardware", "versions"} <= set(content)
        found = {(row["training"], row["model"], row["stage"]): row for row in content["rows"]}
        assert len(found) == len(content["rows"]) == 3 * 2 * 2
        for (kind, model, stage), row in found.items():
            dense = found[kind, "dense", stage]
            assert row["samples"] == 2
            assert row["tokens_per_s"] == pytest.approx(1e3 * 2 * 32 / row["median_ms"])
            assert row["speed_over_dense"] == dense["median_ms"] / row["median_ms"]
            assert (row["sparsity"] is None) == (model == "dense")
            assert row["model_flops_utilisation"] is None
        size = {kind: found[kind, "lte", 1]["estimated_memory_bytes"]["weights"] for kind in module.KINDS}
        assert size["qlora"] < size["full"] < size["lora"]

    def test_adapters_are_computed_in_bf16(self, script: Any) -> None:
        module = script("training_speed")
        args = module.parse([])
        configs = {kind: module.make_config(args, kind, "dense") for kind in module.KINDS}
        assert {kind: config.bf16 for kind, config in configs.items()} == {"full": False, "lora": True, "qlora": True}
        assert configs["lora"].weights_dtype == "bfloat16"
        assert all(config.tf32 for config in configs.values())
        assert not module.make_config(module.parse(["--no-tf32"]), "full", "dense").tf32

    def test_profiled_steps_are_not_counted(self, script: Any) -> None:
        module = script("training_speed")
        for profiled, expected in ((0, [2e3, 3e3]), (1, [2e3, 3e3]), (2, [2e3]), (3, [])):
            clock = module.StepClock(5, 2, profiled)
            # The steps of a stage take 0, 1, 2, 3 and 4 seconds.
            clock.begins = [0.0, 0.0, 1.0, 3.0, 6.0, 10.0, 10.0, 11.0, 13.0, 16.0]
            assert clock.samples_ms(1) == clock.samples_ms(2) == expected

    def test_on_a_gpu_nobody_waits_between_steps(self, script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        module, now = script("training_speed"), itertools.count(10, 3)

        class Event:
            def __init__(self, enable_timing: bool):
                self.ms, self.waits = 0, 0

            def record(self) -> None:
                self.ms = next(now)

            def synchronize(self) -> None:
                self.waits += 1

            def elapsed_time(self, end: Any) -> float:
                return end.ms - self.ms

        cuda = {"is_available": lambda: True, "Event": Event, "max_memory_allocated": lambda: 7, "synchronize": None}
        for name, value in {**cuda, "reset_peak_memory_stats": lambda: None}.items():
            monkeypatch.setattr(torch.cuda, name, value)
        clock = module.StepClock(5, 2)
        for step in range(10):
            clock.on_step_begin(None, SimpleNamespace(global_step=step), None)
        assert not any(event.waits for event in clock.begins)
        assert clock.samples_ms(1) == clock.samples_ms(2) == [3, 3]
        assert clock.peak_bytes(1) == 7

    def test_kernels_are_those_of_a_step(self, script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        module = script("training_speed")
        kinds = module.DeviceType
        times = [("mm", kinds.CPU, 4000, 0), ("sgemm", kinds.CUDA, 0, 6000), ("add", kinds.CUDA, 0, 2000)]
        events = [
            SimpleNamespace(
                key=key, device_type=kind, self_cpu_time_total=cpu, self_device_time_total=gpu, count=4,
                is_user_annotation=key.startswith("Optimizer.step"),
            )
            for key, kind, cpu, gpu in [
                *times, ("aten::launch", kinds.CPU, 1000, 9000), ("Optimizer.step#AdamW.step", kinds.CUDA, 0, 7000)
            ]
        ]  # fmt: skip
        found = {}
        for on_gpu in (True, False):
            monkeypatch.setattr(torch.cuda, "is_available", lambda on_gpu=on_gpu: on_gpu)
            found[on_gpu] = module.kernel_times(events, 2)
        kernels = [("sgemm", 3.0, 2.0), ("add", 1.0, 2.0)]
        assert found[True]["device_ms"] == 4.0
        assert [(each["name"], each["ms"], each["calls"]) for each in found[True]["kernels"]] == kernels
        assert found[False]["device_ms"] == 2.5

    def test_a_gpu_waits_before_the_kernel_that_comes_late(self, script: Any) -> None:
        """Kernels of two streams run at the same time, and the host's own work is none; a short wait does not count."""
        module = script("training_speed")
        gpu, cpu = module.DeviceType.CUDA, module.DeviceType.CPU
        given = [("b", gpu, 130, 200), ("a", gpu, 0, 100), ("side", gpu, 50, 120), ("host", cpu, 200, 900)]
        given += [("b", gpu, 500, 510), ("a", gpu, 520, 600), ("Optimizer.step#", gpu, 210, 490)]
        events = [
            SimpleNamespace(
                name=name,
                device_type=kind,
                time_range=SimpleNamespace(start=start, end=end),
                is_user_annotation=name.startswith("Optimizer.step"),
            )
            for name, kind, start, end in given
        ]
        found = module.idle_times(events, 2)
        assert found == {"idle_ms": 0.15, "idle": [{"before": "b", "ms": 0.15, "waits": 0.5}]}
        assert module.idle_times([], 2) == {"idle_ms": 0, "idle": []}

    def test_flops_are_those_of_all_products(self, script: Any) -> None:
        module = script("training_speed")
        config = shape_config("llama2-7b")
        weights = sum(p.numel() for p in meta_model(config).parameters()) - 32000 * 4096
        scores = 32 * 2 * 2048 * 4096
        flops = functools.partial(module.training_flops, config, length=2048)
        assert flops("full") == pytest.approx(6 * weights + 3 * scores, rel=1e-4)
        assert flops("lora") == pytest.approx(4 * weights + 3 * scores, rel=1e-4)
        assert flops("full", teacher=True) == pytest.approx(8 * weights + 4 * scores, rel=1e-4)

    @pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes (pip install bitsandbytes)")
    def test_weights_in_4_bits_are_those_that_loading_gives(self, script: Any, tmp_path: Path) -> None:
        from bitsandbytes.nn import Linear4bit

        module = script("training_speed")
        model = module.make_model(module.parse(self.FLAGS), "qlora", sparse=True)
        model.save_pretrained(tmp_path)
        loaded = adapters._in_4_bits(model, tmp_path, TrainConfig(lora_rank=4, lora_4bit=True, bf16=True))
        module.pack_4_bits_(model)
        others = dict(loaded.named_modules())
        assert all(type(module) is type(others[name]) for name, module in model.named_modules())
        packed = [name for name, each in others.items() if isinstance(each, Linear4bit)]
        assert len(packed) == 2 * 7
        for name in packed:
            found, expected = model.get_submodule(name), others[name]
            assert found.compute_dtype == expected.compute_dtype == torch.bfloat16
            assert torch.equal(numbers_in_4_bits(found), numbers_in_4_bits(expected))

    @pytest.mark.parametrize("failing", [(False, True), (True,), (False,)])
    def test_too_little_memory_is_a_row(
        self, script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: tuple[bool, ...]
    ) -> None:
        module, output, before = script("training_speed"), tmp_path / "rows.json", [0]

        def train(args: Any, kind: str, sparse: bool) -> dict[str, Any]:
            assert before[0] == 1
            before[0] = 0
            if sparse in failing:
                raise torch.OutOfMemoryError("it is full")
            clock = module.StepClock(args.steps, args.warm_up)
            clock.begins = [float(second) for second in range(8)]
            return {"clock": clock, "sparsity": {}, "estimate": {}}

        monkeypatch.setattr(module, "train", train)
        monkeypatch.setattr(module, "free_memory", lambda compiled: before.__setitem__(0, 1))
        module.main([*self.FLAGS, "--kinds", "full", "--output", str(output)])
        rows = read_json(output)["rows"]
        names = {False: "dense", True: "lte"}
        # What the other model took stays.
        others = [names[sparse] for sparse in (False, True) if sparse not in failing]
        measured, noted = rows[: 2 * len(others)], rows[2 * len(others) :]
        assert [row["model"] for row in measured] == others * 2
        assert all(row["speed_over_dense"] == (1 if others == ["dense"] else None) for row in measured)
        note = {"training": "full", "note": "out of memory: it is full"}
        assert noted == [{**note, "model": names[sparse]} for sparse in failing]

    def test_settings_that_measure_nothing_are_refused(self, script: Any, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            script("training_speed").main([*self.FLAGS, "--warm-up", "3"])
        said = capsys.readouterr().err
        assert "--warm-up must leave two of the steps, one of them profiled if any is, got --warm-up 3 of 4 and" in said
        for flags in (["--warm-up", "1", "--profiled-steps", "3"], ["--warm-up", "-1"], ["--profiled-steps", "-1"]):
            with pytest.raises(SystemExit):
                script("training_speed").parse([*self.FLAGS, *flags])
        assert script("training_speed").parse([*self.FLAGS, "--profiled-steps", "2"]).profiled_steps == 2


class TestTrainingCost:
    def test_a_table_of_arithmetic_and_of_what_was_measured(self, script: Any, tmp_path: Path) -> None:
        module, page = script("training_cost"), tmp_path / "page.md"
        page.write_text(f"before\n{module.BEGIN}\nold\n{module.END}\nafter\n")
        row = {"training": "lora", "model": "lte", "tokens_per_s": 2000.0, "peak_memory_bytes": 4e10,
               "model_flops_utilisation": 0.25}  # fmt: skip
        rows = [{**row, "stage": 1}, {**row, "stage": 2, "tokens_per_s": 1000.0}]
        config = {key: value for key, value in vars(module.parse([])).items() if key != "output"}
        measured = {"config": config, "processes": 1, "rows": rows}
        # Weights in fp32 are another training, which takes longer.
        other = {
            **measured,
            "config": {**config, "weights_dtype": "float32"},
            "rows": [{**rows[0], "tokens_per_s": 1.0}],
        }
        # Of another size and kind: it says nothing of the LoRA of a large model.
        small = {
            **measured,
            "config": {**config, "shape": "qwen2.5-1.5b"},
            "rows": [{**rows[0], "training": kind, "model_flops_utilisation": 0.1} for kind in ("lora", "full")],
        }
        files = [tmp_path / "measured.json", tmp_path / "other.json", tmp_path / "small.json"]
        for file, content in zip(files, (measured, other, small), strict=True):
            file.write_text(json.dumps(content))
        module.main(["--measured", *map(str, files), "--page", str(page)])
        lines = page.read_text().splitlines()
        assert (lines[0], lines[-1]) == ("before", "after")
        assert "old" not in lines
        cells = {tuple(line.split(" | ")[:2]): line.split(" | ") for line in lines if line.startswith("| ")}
        # 1e8 tokens at the mean of both stages, in time: 1333 tokens per second.
        assert cells["| 7B", "LoRA"][2:4] == ["40\\*", "1"]
        assert cells["| 7B", "LoRA"][-1] == "21\\* |"
        assert "\\*" not in "".join(cells["| 7B", "full"])
        # What is not measured takes the share of the peak of the nearest training of the kind, which is named.
        full = module.training_flops(shape_config("llama2-70b"), "lora", 2048) / (0.25 * 989.5e12) * 1e8 / 3600
        assert float(cells["| 70B", "LoRA"][-1].rstrip(" |")) == pytest.approx(full, rel=0.05)
        assert cells["| 70B", "QLoRA"][-1] == "not measured |"
        text = " ".join(lines)
        assert "share that llama2-7b, LoRA, had (25% of the peak in bf16, `measured.json`): 13B LoRA" in text
        assert "share that qwen2.5-1.5b, full, had (10% of the peak in bf16, `small.json`): 7B full" in text
        assert "Without hours, since no training of the kind was measured: 1.5B QLoRA, 7B QLoRA" in text

    def test_the_page_holds_what_the_script_writes(self, script: Any, tmp_path: Path) -> None:
        module, page = script("training_cost"), SCRIPTS.parent / "docs" / "scaling.md"
        copy = tmp_path / "page.md"
        copy.write_text(page.read_text())
        module.main(["--page", str(copy)])
        assert copy.read_text() == page.read_text()


class TestBlockSparseTraining:
    @pytest.mark.parametrize("experts", [1, 2])
    def test_gathered_experts_have_the_gradients_of_masked_ones(self, script: Any, experts: int) -> None:
        module, mask = script("block_sparse_training"), torch.rand(24, 6) < 0.4
        # One that nobody wants, one that all want, and a token that wants none.
        mask[:, 0], mask[:, 1], mask[3] = False, True, False
        shapes, size = [(24, 8), (48, 8), (48, 8), (8, 48)], 8
        inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
        groups, grad = module.Groups.of(mask, experts, size), torch.randn(24, 8)
        found = module.gradients(functools.partial(module.grouped_ffn, groups), inputs, grad)
        expected = module.gradients(functools.partial(module.masked_ffn, mask), inputs, grad)
        for value, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5)

    def test_tiles_that_no_token_needs(self, script: Any) -> None:
        module = script("block_sparse_training")
        # Two kinds of tokens in turn, each of which wants one half of 8 experts.
        mask = torch.zeros(32, 8, dtype=torch.bool)
        mask[::2, :4], mask[1::2, 4:] = True, True
        assert module.tile_share(mask, (16, 8), 4, sort=False) == 1
        assert module.tile_share(mask, (16, 8), 4, sort=True) == 0.5
        assert module.tile_share(mask[:16:2], (8, 32), 4, sort=False) == 1

    def test_rows_of_random_and_of_recorded_masks(self, script: Any, tmp_path: Path) -> None:
        module = script("block_sparse_training")
        flags = ["--tokens", "128", "--repeats", "1", "--output", str(tmp_path / "rows.json")]
        module.main(["--shapes", "tiny", "--expert-size", "16", "--sparsities", "0.5", *flags])
        (row,) = read_json(tmp_path / "rows.json")["rows"]
        assert row["sparsity"] == 0.5
        assert [each["provider"] for each in row["times"]] == ["dense", "masked", "grouped 1", "grouped 4"]
        masked = row["times"][1]
        assert all(each["speed_over_masked"] == masked["median_ms"] / each["median_ms"] for each in row["times"])
        module.main(["--model", save_sparse_model(tmp_path), "--length", "16", *flags])
        rows = read_json(tmp_path / "rows.json")["rows"]
        assert [each["tokens"] for each in rows] == [128] * 2
        assert all(0 < each["sparsity"] < 1 for each in rows)

    def test_blocks_that_experts_do_not_fill_are_noted(self, script: Any) -> None:
        row = script("block_sparse_training").measure("x", torch.rand(128, 6) < 0.5, (8, 48), (1, 4), torch.float32, 1)
        assert [each["provider"] for each in row["times"]] == ["dense", "masked", "grouped 1", "grouped 4"]
        assert row["times"][-1] == {"provider": "grouped 4", "note": "6 experts make no blocks of 4"}

    def test_a_function_is_compiled_once(self, script: Any) -> None:
        module = script("block_sparse_training")
        x: Any = SimpleNamespace(is_cuda=True)
        made = [module.fused(module.switched, x) for _ in range(2)]
        assert made[0] is made[1] is not module.switched
        assert module.fused(module.switched, SimpleNamespace(is_cuda=False)) is module.switched

    def test_a_product_that_is_missing_is_noted_and_a_wrong_one_refused(self, script: Any) -> None:
        module, inputs, grad = script("block_sparse_training"), [torch.ones(2, requires_grad=True)], torch.ones(2)

        def missing(x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no such kernel")

        runs = {"masked": lambda x: 2 * x, "grouped 1": missing}
        assert module.check(runs, inputs, grad) == {"grouped 1": "RuntimeError: no such kernel"}
        assert list(runs) == ["masked"]
        with pytest.raises(GateError, match="output of grouped 1"):
            module.check({"masked": lambda x: 2 * x, "grouped 1": lambda x: 3 * x}, inputs, grad)


class TestSpeculation:
    def test_a_row_for_each_provider_and_kind(self, script: Any, tmp_path: Path) -> None:
        module, folder = script("speculation"), save_sparse_model(tmp_path)
        (tmp_path / "prompts.json").write_text(
            json.dumps({"edits": ["a b c a b c a b"], "chats": ["Who?", "Why is it?"]})
        )
        flags = ["--dtype", "float32", "--lookup", "3", "--draft-tokens", "2", "--tokens", "24"]
        flags += ["--rounds", "2", "--prompts", str(tmp_path / "prompts.json"), "--assistant", folder]
        module.main([folder, *flags, "--output", str(tmp_path / "rows.json")])
        found = read_json(tmp_path / "rows.json")
        names = ["plain", "plain, by modules", "lookup of 3", "lookup of 3, told", "assistant, 2 tokens"]
        assert [(row["kind"], row["provider"]) for row in found["rows"]] == [
            (kind, name) for kind in ("edits", "chats") for name in names
        ]
        for row in found["rows"]:
            assert row["prompts"] == {"edits": 1, "chats": 2}[row["kind"]]
            assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
            assert row["git_commit"] == environment()["git_commit"]
            assert row["equal_answers"] == row["prompts"]
            assert row["differences"] == []
            if row["provider"].startswith("plain"):
                assert row["tokens_per_pass"] == 1
        # The assistant is the model itself: what it proposes stays, up to 3 tokens at a time.
        assert all(
            1.5 < row["tokens_per_pass"] <= 3 for row in found["rows"] if row["provider"].startswith("assistant")
        )
        assert found["whole_steps"] == {"plain": True}
        assert [each["kind"] for each in found["matches"]] == ["edits", "chats"]
        assert found["rows"][0]["speedup"] == {"median": 1.0, "p20": 1.0, "p80": 1.0}
        # A step of plain decoding, and passes with room for as many tokens as an engine takes.
        assert [(each["kind"], each["proposed"]) for each in found["passes"]] == [
            (kind, proposed) for kind in ("edits", "chats") for proposed in (None, *range(8))
        ]
        assert all(0 < each["p20_ms"] <= each["median_ms"] <= each["p80_ms"] for each in found["passes"])
        args = module.parse([folder, "--lookup", "--no-modules", "--output", "rows.json"])
        assert [*module.providers_of(None, args)] == ["plain"]

    def test_passes_read_the_answer(self, script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """At each of the places: what a pass computes for its tokens is what the model computes for the whole text."""
        module, found = script("speculation"), dict[str, torch.Tensor]()

        def called(runs: Any, *given: Any) -> dict[str, list[float]]:
            found.update({name: run() for name, run in runs.items()})
            return {name: [1.0] for name in runs}

        monkeypatch.setattr(module, "interleaved_times", called)
        model = lte.accelerate_(load_any_model(save_sparse_model(tmp_path), "float32"))
        text = torch.tensor([[3, 4, 5, 6, 3, 4, 7, 8, 9, 10, 3, 4, 5, 6, 3, 4, 7, 8]])
        with module.hard_inference(model):
            best = model(text).logits[0].argmax(-1)
            module.pass_times(model, "chats", {"plain": [(text[0, 4:], [])]}, [("chats", text[:, :4])])
        assert [*found] == ["None", *map(str, range(8))]
        for name, chosen in found.items():
            tokens = 1 if name == "None" else int(name) + 1
            assert torch.equal(chosen[:tokens], best[4 : 4 + tokens])

    def test_matches_are_those_that_lookup_finds(self, script: Any) -> None:
        chance, wanted = random.Random(0), dict[int, list[int]]()
        texts = [[chance.randrange(few) for _ in range(40)] for few in (2, 3, 8, 30)]
        for text in texts:
            for place in range(10, 40):
                length, end = match_of(text[:place], 8)
                if length:
                    counts = wanted.setdefault(length, [0] * 8)
                    following = text[end : min(end + 7, place)]
                    for kept in range(8):
                        counts[kept] += len(following) >= kept and following[:kept] == text[place : place + kept]
        prompts = [(kind, torch.tensor([text[:10]])) for kind, text in zip("aaab", texts, strict=True)]
        plain = [(torch.tensor(text[10:]), []) for text in texts]
        found = [script("speculation").matches_of(kind, plain, prompts) for kind in "ab"]
        assert [each["kind"] for each in found] == ["a", "b"]
        total: dict[str, list[int]] = {}
        for each in found:
            for length, counts in each["counts"].items():
                total[length] = [one + other for one, other in zip(total.get(length, [0] * 8), counts, strict=True)]
        assert {int(length): counts for length, counts in total.items()} == wanted
        assert len(wanted) > 4

    def test_differences_are_explained(self, script: Any) -> None:
        module = script("speculation")
        model, clock = randomise_routers_(lte.sparsify_(tiny_dense_model(), lte.LteConfig(expert_size=8))), PassClock()
        for count in (4, 1, 1):
            clock.put(torch.zeros(count))
        one, other = torch.tensor([5, 6, 7]), torch.tensor([5, 8, 7])
        prompts = [("chats", torch.tensor([[3, 4]]))]
        measured = {"plain": [(one, [clock])], "lookup of 3": [(other, [clock])]}
        rows = module.rows_of("chats", measured, prompts)
        assert [row["equal_answers"] for row in rows] == [1, 0]
        module.explain(model, rows, measured, prompts)
        (difference,) = rows[1]["differences"]
        assert (difference["prompt"], difference["place"]) == (0, 1)
        with torch.no_grad():
            best = model(torch.tensor([[3, 4, 5]])).logits[0, -1].double().topk(2).values
        assert difference["logit_gap"] == pytest.approx((best[0] - best[1]).item(), rel=1e-4)
        assert 0 <= difference["score_distance"] < 0.5
        assert module.place_of_difference(torch.tensor([1, 2]), torch.tensor([1, 2, 3])) == 2


def test_decoding_in_parts_is_checked_and_timed_beside_the_dense_model(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    module, work = script("tensor_parallel"), ["--work", str(tmp_path), "--output", str(tmp_path / "rows.json")]
    flags = ["--shape", "tiny", "--dtype", "float32", "--context", "32", "--turns", "2", "--steps", "2"]
    module.main([*flags, "--sparsities", "0.5", "--batches", "1", *work])
    found = read_json(tmp_path / "rows.json")
    ways = [(None, None), (0.5, "masked"), (0.5, "kernels")]
    assert [row["equal_tokens"] for row in found["gate"]] == [64] * 3
    assert [(row["sparsity"], row["ffn"]) for row in found["gate"]] == ways
    assert [(row["way"], row["sparsity"], row["ffn"]) for row in found["rows"]] == [
        (way, *each) for way in ("launched", "graph") for each in ways
    ]
    dense, masked, fast = found["rows"][:3]
    assert dense["over_dense"] == 1
    assert fast["over_dense"] == fast["median_ms"] / dense["median_ms"]
    assert 0.3 < masked["active_fraction"] == fast["active_fraction"] < 0.7
    assert masked["weight_bytes_per_process"] == fast["weight_bytes_per_process"] > dense["weight_bytes_per_process"]
    whole = module.whole
    monkeypatch.setattr(module, "whole", lambda logits: whole(logits) + torch.randn_like(logits))
    with pytest.raises(GateError, match="logits of tiny-2 dense in parts"):
        module.main([*flags, *work])
    monkeypatch.setattr(module, "whole", whole)
    monkeypatch.setattr(lte, "accelerate_", lambda model: set_threshold_(model, 0.9))
    with pytest.raises(GateError, match="logits of tiny-2 forced in parts kernels"):
        module.check(module.parse([*flags, *work]))
    torch.distributed.destroy_process_group()


def test_runs_are_held_beside_the_first_one(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = script("same_training")
    result = dict.fromkeys(module.RESULTS, 0.5)
    for name, losses in (("one", [3.0, 2.0, 1.0]), ("two", [3.0, 2.5, 1.25]), ("short", [])):
        folder = tmp_path / name
        folder.mkdir()
        steps = [{"step": 2 * n, "task_loss": loss, "active_fraction": loss / 4} for n, loss in enumerate(losses)]
        (folder / "result.json").write_text(json.dumps(result))
        (folder / "training_log.json").write_text(json.dumps([*steps, {"step": 4, "train_runtime": 1.0}]))
    one, two, short = (str(tmp_path / name) for name in ("one", "two", "short"))
    module.main([one, two, "--output", str(tmp_path / "rows.json")])
    found = read_json(tmp_path / "rows.json")["runs"][1]["from_first"]
    assert found["task_loss"] == {"largest": 0.5, "step": 2, "mean": 0.25}
    assert found["active_fraction"]["largest"] == 0.125
    assert "eta" not in found
    assert "furthest: active_fraction 1.25e-01, task_loss 5.00e-01" in capsys.readouterr().out.splitlines()[1]
    with pytest.raises(ValueError, match="runs must have logged the same steps, got none of one in short"):
        module.main([one, short])
    with pytest.raises(
        ValueError, match=r"folders must be of finished runs of lte train, got .* without a training_log"
    ):
        module.main([one, str(tmp_path)])


def test_the_checkpoint_of_a_conversion_is_one_file_that_converts(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversion = script("conversion")
    tiny = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    monkeypatch.setattr(conversion, "LLAMA2_7B", {**conversion.LLAMA2_7B, **tiny, "num_key_value_heads": 4})
    conversion.make_checkpoint(tmp_path / "dense", 2)
    assert [path.name for path in (tmp_path / "dense").glob("*.safetensors")] == ["model.safetensors"]
    convert_folder(tmp_path / "dense", tmp_path / "sparse", lte.LteConfig(expert_size=8))
    assert conversion.layer_bytes(tmp_path / "sparse") < conversion.size(tmp_path / "sparse") / 2
    assert conversion.size(tmp_path / "sparse") > conversion.size(tmp_path / "dense")
    found = conversion.measured([sys.executable, "-c", "x = bytearray(10**8)"])
    assert found["peak_rss_bytes"] > 1e8
    assert found["seconds"] > 0
    with pytest.raises(RuntimeError, match="ended with 3"):
        conversion.measured([sys.executable, "-c", "exit(3)"])


class TestVllmBench:
    def test_prompts_of_a_folder_are_text_from_all_over(self, script: Any, tmp_path: Path) -> None:
        module, text = script("vllm_bench"), "".join(f"Line {number} of a text.\n" for number in range(400))
        (tmp_path / "text.txt").write_text(text)
        folder = save_tiny_model(tmp_path / "folder")
        job = {"folder": str(folder), "text": str(tmp_path / "text.txt"), "prompts": "text", "input_len": 8}
        assert [row[0] for row in module.pieces(range(107), 4, 8)] == [0, 25, 50, 75]
        ids = load_tokenizer(folder)(text, add_special_tokens=False)["input_ids"]
        make = module.prompt_maker(job, 5)
        assert [row["prompt_token_ids"] for row in make(4, 8)] == module.pieces(ids, 4, 8)
        with pytest.raises(ValueError, match=r"text must hold .* tokens or more, got .*; give a longer one"):
            make(1, len(ids) + 1)
        prompts = module.text_prompts(job, 4)
        assert len(set(prompts)) == 4
        assert all(prompt in text for prompt in prompts)
        given = module.prompt_maker({**job, "prompts": module.RANDOM}, 5)(3, 7)
        assert torch.tensor([prompt["prompt_token_ids"] for prompt in given]).unique().tolist() == [0, 1, 2, 3, 4]

    def test_files_of_prompts_are_those_that_vllm_reads(self, script: Any, tmp_path: Path) -> None:
        module, folder = script("vllm_bench"), save_tiny_model(tmp_path / "folder")
        (tmp_path / "text.txt").write_text("".join(f"Line {number} of a text.\n" for number in range(99)))
        job = {"folder": str(folder), "text": str(tmp_path / "text.txt"), "input_len": 8, "output_len": 3}
        flags = module.custom_flags(job, tmp_path, 4)
        lines = [json.loads(line)["prompt"] for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
        assert flags[:4] == ["--dataset-name", "custom", "--dataset-path", str(tmp_path / "prompts.jsonl")]
        assert lines == module.text_prompts(job, 4)

    def test_work_of_a_gpu_is_that_of_its_kernels_and_copies(
        self, script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of two GPUs that share a model the mean, and of traces of earlier answers nothing."""
        module, calls = script("vllm_bench"), list[str]()

        def events(*kinds: str) -> bytes:
            found = [{"cat": kind, "dur": 500 * number} for number, kind in enumerate(kinds, 1)]
            return gzip.compress(json.dumps({"traceEvents": [*found, {"name": "no category"}]}).encode())

        class Engine:
            kinds = ("kernel", "gpu_memcpy", "cpu_op", "gpu_memset")

            def start_profile(self) -> None:
                calls.append("start")

            def stop_profile(self) -> None:
                calls.append("stop")
                for rank in range(2):
                    (tmp_path / f"rank{rank}.{len(calls)}.json.gz").write_bytes(events(*self.kinds))

        engine = Engine()
        monkeypatch.setattr(module, "answer_ms", lambda _, prompts, tokens: calls.append(f"{prompts} {tokens}"))
        assert module.gpu_ms(engine, "a", 1, tmp_path) == module.gpu_ms(engine, "b", 2, tmp_path) == 3.5
        assert calls == ["start", "a 1", "stop", "start", "b 2", "stop"]
        engine.kinds = ("cpu_op",)
        with pytest.raises(ValueError, match="traces must hold work of a GPU, got none in 2 files"):
            module.gpu_ms(engine, "c", 1, tmp_path)

    def test_a_tool_that_fails_leaves_the_others(
        self, script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module, output, closed = script("vllm_bench"), tmp_path / "rows.json", list[str]()

        class Tool:
            def __init__(self, name: str, jobs: list[dict[str, Any]]):
                assert [job["prompts"] for job in jobs] == ["Python's help topics"] * 2
                self.name = name

            def run(self, job: dict[str, Any]) -> Any:
                if self.name == "throughput":
                    raise ValueError("no throughput")
                if self.name == "serve":
                    yield {"tool": "serve", "batch": 1, "median_tpot_ms": 3}
                    return
                yield {"tool": "latency", "batch": 1, "ms_per_step": 1.0 if job["sparsity"] else 2.0}
                raise module.subprocess.CalledProcessError(1, "latency")

            def close(self) -> None:
                closed.append(self.name)

        jobs = [{"model": name, "folder": name, "sparsity": of} for name, of in (("dense", None), ("sparse", 0.5))]
        monkeypatch.setattr(module, "measuring", lambda tool, jobs, _: Tool(tool, jobs))
        monkeypatch.setattr(module, "write_densified", lambda *_: jobs)
        monkeypatch.setattr(module, "vllm_version", lambda: "0")
        flags = ["--folder", "some", "--tools", "latency", "throughput", "serve", "--work", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["vllm_bench.py", *flags, "--output", str(output)])
        with pytest.raises(SystemExit, match="4 of 6 measurements failed"):
            module.main()
        found = read_json(output)
        rows = [(row["tool"], row["model"], row.get("over_dense")) for row in found["rows"]]
        assert rows == [
            ("latency", "dense", None), ("latency", "sparse", 0.5), ("serve", "dense", None), ("serve", "sparse", 1.0)
        ]  # fmt: skip
        assert [(failure["model"], failure["tool"]) for failure in found["failed"]] == [
            (model, tool) for tool in ("latency", "throughput") for model in ("dense", "sparse")
        ]
        assert found["failed"][2]["error"] == "ValueError: no throughput"
        assert closed == ["latency", "throughput", "serve"]

    @pytest.mark.parametrize("together", [False, True])
    def test_engines_start_together_or_one_by_one_and_a_failed_one_is_named(
        self, script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: bool
    ) -> None:
        """A stand-in for the engines writes down who started before whom was measured."""
        module, log = script("vllm_bench"), tmp_path / "log"
        worker = f"""
            import json, os, sys, time
            log = open({str(log)!r}, "a")
            job = json.loads(sys.stdin.readline())
            if job["folder"] == "broken":
                sys.exit(3)
            print("start", job["folder"], file=log, flush=True)
            print("words of the engine\\nENGINE STARTED", flush=True)
            while (line := sys.stdin.readline()) != "rows\\n":
                assert float(line) > 0
                print("round", job["folder"], file=log, flush=True)
                if job["folder"] == "weak":
                    sys.exit(4)
                print("ROUND ENDED", flush=True)
            print("ROW " + json.dumps({{"folder": job["folder"]}}), flush=True)
        """
        (tmp_path / "worker.py").write_text(textwrap.dedent(worker))
        monkeypatch.setattr(module, "__file__", str(tmp_path / "worker.py"))
        jobs = [{"folder": name, "cpus": 0, "repeats": 2} for name in ("a", "broken", "b", "weak")]
        found = list[dict[str, Any]]()
        with contextlib.closing(module.EngineWorkers(jobs, together)) as workers:
            for job in jobs:
                try:
                    found += workers.run(job)
                except module.subprocess.CalledProcessError as error:
                    found.append({"failed": error.returncode})
        assert found == [{"folder": "a"}, {"failed": 3}, {"folder": "b"}, {"failed": 4}]
        order = log.read_text().splitlines()
        if together:
            assert {*order[:3]} == {"start a", "start b", "start weak"}
            assert order[3:] == ["round a", "round b", "round weak", "round a", "round b"]
        else:
            alone = [["start " + name, *["round " + name] * 2] for name in "ab"]
            assert order == [*alone[0], *alone[1], "start weak", "round weak"]

    def test_rows_are_medians_of_rounds_and_ratios_those_of_the_same_round(self, script: Any) -> None:
        """A host that slows down from round to round slows both models."""
        module, slower = script("vllm_bench"), (1.0, 2.0, 4.0)
        some = {"lte:active_fraction_count": 2.0, "lte:active_fraction_sum": 1.0, "steps_decode": 128.0}
        counts = {**some, "lte:union_fraction_count": 0.0, "lte:union_fraction_sum": 0.0, "steps_masked": 0.0}

        def rounds(step: float, since: dict[str, float]) -> list[list[dict[str, Any]]]:
            first = {"tool": "latency", "batch": 4, "input_len": 8, "since": since}
            second = {"tool": "prompt", "batch": 1, "input_len": 9}
            return [
                [{**first, "ms_first_token": 5.0, "ms_per_step": step * by}, {**second, "ms_first_token": step * by}]
                for by in slower
            ]

        dense, sparse = (list(module.joined(rounds(step, since))) for step, since in ((2.0, {}), (1.0, counts)))
        found = sparse[0]
        assert (found["ms_per_step"], found["ms_per_step_rounds"]) == (2.0, [1.0, 2.0, 4.0])
        assert (found["active_fraction"], found["samples"], found["steps_decode"]) == (0.5, 6.0, 384.0)
        assert not {"since", "union_fraction", "steps_masked"} & {*found}
        own = [{"group": "g", "sparsity": sparsity} for sparsity in (None, 0.5)]
        rows = [{**each, **row} for each, rows in zip(own, (dense, sparse), strict=True) for row in rows]
        module.add_ratios(rows)
        ratios = [[row.get(f"over_dense{end}") for end in ("_p20", "", "_p80")] for row in rows]
        assert ratios == [[None] * 3] * 2 + [[0.5] * 3] * 2

    def test_throughput_is_that_of_all_prompts_at_once(self, script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """By engines that are as vLLM has them by itself, in rounds as latency is measured."""
        module, asked = script("vllm_bench"), list[tuple[int, int]]()
        monkeypatch.setattr(module, "sampled", dict)

        def answer_ms(llm: Any, prompts: list[Any], tokens: int) -> float:
            asked.append((len(prompts), tokens))
            return 500.0 * tokens

        monkeypatch.setattr(module, "answer_ms", answer_ms)
        job = {"tool": "throughput", "num_prompts": 6, "input_len": 8, "output_len": 4, "batches": [1], "cuda": True}
        job |= {"dtype": "bfloat16", "prompt_lens": [], "eager": False, "tensor_parallel": 1, "engines": 3}
        options = module.engine_options({**job, "gpu_time": False})
        assert not {"max_num_seqs", "compilation_config"} & {*options}
        rounds = [module.one_round(None, job, lambda count, length: [length] * count) for _ in range(2)]
        assert asked == [(6, 2), (6, 4)] * 2
        (row,) = module.joined(rounds)
        assert (row["elapsed_s"], row["elapsed_s_rounds"], row["tokens_per_second"]) == (2.0, [2.0, 2.0], 36.0)
        rows = [{"group": "g", "sparsity": None, **row}]
        rows.append({**rows[0], "sparsity": 0.5, "elapsed_s_rounds": [1.0, 1.0]})
        module.add_ratios(rows)
        assert rows[1]["over_dense"] == 0.5

    @pytest.mark.parametrize("said", [True, False])
    def test_what_an_engine_says_of_its_graphs_is_kept(
        self,
        script: Any,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        said: bool,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        module, line = script("vllm_bench"), "INFO Graph capturing finished in 10 secs, took 0.82 GiB"
        worker = f"""
            import sys
            print({line if said else "nothing"!r}, file=sys.stderr, flush=True)
            print("ENGINE STARTED", flush=True)
            for line in iter(sys.stdin.readline, "rows\\n"):
                print("ROUND ENDED", flush=True)
            print("ROW {{}}", flush=True)
        """
        (tmp_path / "worker.py").write_text(textwrap.dedent(worker))
        monkeypatch.setattr(module, "__file__", str(tmp_path / "worker.py"))
        job = {"folder": "a", "cpus": 0, "repeats": 1}
        with contextlib.closing(module.EngineWorkers([job], True)) as workers:
            (listener,) = workers._listeners.values()
            end = time.monotonic() + 60
            while said and not listener.graphs and time.monotonic() < end:
                time.sleep(0.01)
            assert [*workers.run(job)] == [{"graphs_s": 10, "graphs_gib": 0.82} if said else {}]
        listener.join()
        assert (line in capfd.readouterr().err) == said

    def test_engines_that_are_left_in_the_middle_are_ended(
        self, script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One that measures, one that waits, and those of a start that is stopped."""
        module = script("vllm_bench")
        worker = """
            import json, sys, time
            job = json.loads(sys.stdin.readline())
            print("ENGINE STARTED", flush=True)
            for line in iter(sys.stdin.readline, "rows\\n"):
                if not line:
                    sys.exit(0)
                print("ROUND ENDED", flush=True)
            print("ROW {}", flush=True)
            time.sleep(100)
        """
        (tmp_path / "worker.py").write_text(textwrap.dedent(worker))
        monkeypatch.setattr(module, "__file__", str(tmp_path / "worker.py"))
        started, popen = list[Any](), module.subprocess.Popen

        def noted(*args: Any, **kwargs: Any) -> Any:
            started.append(popen(*args, **kwargs))
            return started[-1]

        monkeypatch.setattr(module.subprocess, "Popen", noted)
        jobs = [{"folder": name, "cpus": 0, "repeats": 1} for name in "ab"]
        with contextlib.closing(module.EngineWorkers(jobs, True)) as workers:
            rows = workers.run(jobs[0])
            assert next(rows) == {}
            with pytest.raises(ValueError, match="job must be the next of those that were given, got job=a"):
                next(workers.run(jobs[0]))
            assert [process.poll() for process in started] == [None, None]
            rows.close()
        assert [process.poll() for process in started] == [-signal.SIGTERM, 0]
        started.clear()
        monkeypatch.setattr(module, "_read_until", lambda process, line: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            module.EngineWorkers(jobs, True)
        assert len(started) == 2
        assert None not in [process.poll() for process in started]

    @pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinities are Linux's")
    def test_an_engine_is_measured_on_the_fastest_cpus(self, script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """With its threads and what it has started, which one that starts nothing more keeps."""
        module, allowed = script("vllm_bench"), os.sched_getaffinity(0)
        probed = list[set[int]]()

        def probe() -> float:
            probed.append(os.sched_getaffinity(0))
            return 99 - max(probed[-1])  # the last one is the fastest

        monkeypatch.setattr(module, "_probe", probe)
        monkeypatch.setattr(module, "_siblings", lambda cpu: {cpu})
        assert module.fastest_cpus(1) == ([max(allowed)], 99 - max(allowed))
        assert sorted({*map(min, probed)}) == sorted(allowed)
        assert os.sched_getaffinity(0) == allowed
        assert module.fastest_cpus(0)[0] == []
        with pytest.raises(ValueError, match=f"cpus must be at most the number of cores, {len(allowed)}, got cpus=999"):
            module.fastest_cpus(999)
        monkeypatch.setattr(module, "_siblings", lambda cpu: allowed)
        with pytest.raises(ValueError, match="number of cores, 1, got cpus=2"):
            module.fastest_cpus(2)

        parent = """
            import subprocess, sys, threading, time
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            print(child.pid, threading.enumerate()[-1].native_id, flush=True)
            sys.stdin.read()
            child.kill()
        """
        command = [sys.executable, "-c", textwrap.dedent(parent)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            tasks = [process.pid, *map(int, process.stdout.readline().split())]
            module.pin(process.pid, [])
            assert [os.sched_getaffinity(task) for task in tasks] == [allowed] * 3
            module.pin(process.pid, [max(allowed)])
            assert [os.sched_getaffinity(task) for task in tasks] == [{max(allowed)}] * 3
            process.communicate("")
        module.pin(process.pid, [max(allowed)])  # it has ended

    def test_engines_at_the_same_time_share_the_memory_and_compile_apart(self, script: Any, tmp_path: Path) -> None:
        module = script("vllm_bench")
        job = {"folder": "out/a", "caches": str(tmp_path), "cuda": False, "engines": 3}
        assert module.memory_options(job)["gpu_memory_utilization"] == pytest.approx(0.2)
        other = {**job, "folder": "other/a"}
        caches = [Path(module.job_environment(each)["VLLM_CACHE_ROOT"]) for each in (job, other)]
        assert len({*caches}) == 2
        assert {cache.parent for cache in caches} == {tmp_path}
        assert module.job_environment({**job, "engines": 1}) == dict(os.environ)


class TestVllmRanks:
    def test_every_difference_is_compared_and_those_in_fp32_are_traced(
        self, script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module, jobs, output = script("vllm_ranks"), list[dict[str, Any]](), tmp_path / "ranks.json"

        def served(job: dict[str, Any]) -> list[dict[str, Any]]:
            """Over two ranks the sparse model parts from the rest in the second prompt of the second batch size."""
            jobs.append(job)
            parts = job["sparsity"] is not None and job["tensor_parallel"] == 2
            answers = [[7, 8, 9], [7, 8, 9]]
            other = [[7, 8, 9], [7, 5, 9]] if parts else answers
            return [{"answers": each, "steps_decode": 64.0, "model_runner": 1} for each in (answers, other)]

        monkeypatch.setattr(module, "served", served)
        monkeypatch.setattr(module, "vllm_version", lambda: "0")
        flags = ["--prompts", "2", "--prompt-lengths", "4", "8", "--tokens", "3", "--batches", "1", "2"]
        flags += ["--work", str(tmp_path / "work"), "--output", str(output)]
        with pytest.raises(SystemExit, match=r"1 of 1 differences in fp32 are not explained: .*'place': 1"):
            module.main(["--shape", "tiny", *flags])
        found = read_json(output)
        assert [(job["dtype"], job["sparsity"], job["tensor_parallel"]) for job in jobs] == [
            (dtype, sparsity, ranks)
            for dtype in ("float32", "bfloat16")
            for sparsity in (None, 0.8)
            for ranks in (1, 2)
        ]
        assert [len(prompt) for prompt in jobs[0]["prompts"]] == [4, 8]
        assert found["git_commit"] == environment()["git_commit"]
        rows = {(row["dtype"], row["sparsity"], row["ranks"], row["batch"]): row for row in found["rows"]}
        assert len(rows) == len(found["rows"]) == 16
        assert "equal_answers" not in rows["float32", 0.8, 1, 2]
        same, parted = rows["float32", None, 2, 2], rows["float32", 0.8, 2, 2]
        assert (same["equal_answers"], same["explained"], same["differences"]) == (2, 0, [])
        assert (parted["equal_answers"], parted["first_differences"]) == (1, [None, 1])
        assert (parted["explained"], parted["reproduced"], parted["steps_decode"]) == (0, 0, 64)
        (difference,) = parted["differences"]
        assert (difference["prompt"], difference["place"], difference["tokens"]) == (1, 1, [8, 5])
        model = load_any_model(jobs[2]["folder"])
        with torch.no_grad():
            logits = model(torch.tensor([[*jobs[0]["prompts"][1], 7]])).logits[0, -1]
        gap = (logits.max() - logits[[8, 5]].min()).item()
        assert difference["logit_gap"] == pytest.approx(gap, rel=1e-4)
        assert rows["bfloat16", 0.8, 2, 2]["equal_answers"] == 1
        assert "differences" not in rows["bfloat16", 0.8, 2, 2]

        # Of a folder, on text, and with a reason.
        monkeypatch.setattr(module, "NEAR_LOGITS", 2 * gap + 1e3)
        folder = save_sparse_model(tmp_path)
        (tmp_path / "text.txt").write_text("A line of a text.\n" * 40)
        ids = load_tokenizer(folder)("A line of a text.\n" * 40, add_special_tokens=False)["input_ids"]
        text = ["--text", str(tmp_path / "text.txt")]
        monkeypatch.setattr(module, "write_densified", lambda *_: [{"model": "s", "folder": folder, "sparsity": 0.0}])
        module.main([folder, *flags, *text, "--dtypes", "float32"])
        assert jobs[-1]["prompts"] == [ids[:4], ids[8:16]]
        row = read_json(output)["rows"][-1]
        assert (row["explained"], row["reproduced"]) == (1, 1)
        with pytest.raises(SystemExit):
            module.parse([folder, "--shape", "tiny"])

    def test_the_decision_that_parts_two_answers_is_found(self, script: Any) -> None:
        module, text = script("vllm_ranks"), torch.arange(3, 9)
        model = randomise_routers_(lte.sparsify_(tiny_dense_model(), lte.LteConfig(expert_size=32)))
        ffn = list(lte.sparse_ffns(model).values())[1]

        def shift(expert: int, logit: float) -> int:
            """Moves an expert's bias so that the last token has this logit; the next token then."""
            with torch.no_grad(), recorded_logits([ffn]):
                model(text[None])
                ffn.router.bias[expert] += ffn.threshold_logit + logit - ffn.logits[0, -1, expert]
            return int(module.last_logits(model, text).argmax())

        for expert in range(ffn.num_experts):
            before = ffn.router.bias.detach().clone()
            off, on = shift(expert, -1e-5), shift(expert, 1e-5)
            if off != on:
                break
            ffn.router.bias.data.copy_(before)
        assert off != on
        found = module.trace(model, text, [on, off])
        assert found["flipped"] == [{"layer": 1, "token": 5, "expert": expert}]
        assert found["score_distance"] == pytest.approx(2.5e-6, rel=0.1)
        assert (found["decisions_near_tau"], found["explained"], found["reproduced"]) == (1, True, True)
        third = next(token for token in range(9) if token not in (on, off))
        # A score is next to tau, but it is not why.
        found = module.trace(model, text, [on, third])
        assert (found["explained"], found["reproduced"], found["flipped"]) == (True, False, [])
        shift(expert, 1e-3)
        found = module.trace(model, text, [on, off])
        assert (found["decisions_near_tau"], found["explained"], found["reproduced"]) == (0, False, False)
