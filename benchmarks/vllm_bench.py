"""Latency, throughput and serving of LTE folders in vLLM, with the dense model in the same run as the baseline.

Run it with the Python of an environment that has vLLM and lte:

    python benchmarks/vllm_bench.py --shape 7b --sparsities 0 0.5 0.8 0.9 --batches 1 4 16 64 --output rows.json
    python benchmarks/vllm_bench.py --folder out/qwen --batches 1 2 4 8 16 32 64 --tools latency throughput serve

A shape is a random model of these widths whose routers are set so that each token picks its own experts, a fixed
share of them on average; a folder is a trained model, beside which its densified copy is written, one for all folders
with `--one-baseline`. `latency` times engines of `vllm.LLM` as `vllm bench latency` does, all batch sizes with one
start: the time of a decoding step is that of answers of `--output-len` tokens less that of answers of one token. CUDA
graphs are captured for these batch sizes alone, and for their prompts: of the dense model up to 512 tokens, of sparse
ones up to as many as lte asks for, or up to `--most-captured` of both. `throughput` gives such an engine all of
`--num-prompts`, of which it answers as many at a time as 16 GiB of cache hold, as `vllm bench throughput` does, with
the graphs that vLLM captures by itself. `serve` is `vllm bench serve`. A tool that fails is named in the record, and
the others go on.

`--cpus 4` has an engine run on four CPUs while it is measured, those on which Python is fastest at that moment, each of
another core: on a shared host some can be half as fast as others, which change, and steps wait for Python. Rows carry
the time of a loop of Python there.

`--together` has the engines of a group start at the same time and stay: each is measured while the others wait, and a
GPU's memory must hold all of them. `latency` and `throughput` then take turns, dense and sparse in each round, and
ratios are of times of the same round.

Shapes are given random tokens. Folders are given text, from another place of it for each request, since a trained
router switches fewer experts on for random tokens: `--text FILE`, or Python's own help.

`--gpu-time` asks a profiler, after all else, how long a GPU works in a step: less than the step takes where the host is
the limit.

Every row carries what was measured of the routing, which model runner of vLLM ran it, and the time over the dense
model's; the record carries the versions and the device. vLLM 0.24 runs some stock families by another model runner than
ours: `VLLM_USE_V2_MODEL_RUNNER=0` (or 1) in the environment has both run by the same. `--tensor-parallel 2` has each
engine, dense and sparse, on so many GPUs.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import gzip
import itertools
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import lte
from lte.bench.shapes import SHAPES as LLAMA_SHAPES
from lte.bench.shapes import random_model
from lte.bench.text import random_ids, read_text, text_name
from lte.files import write_json_atomic
from lte.nn.router import ALWAYS_ON_LOGIT
from lte.records import environment
from lte.vllm.graphs import longest_prompt
from lte.vllm.settings import serve_settings

SHAPES: dict[str, dict[str, Any]] = {
    "7b": LLAMA_SHAPES["llama2-7b"],
    "1.5b": {**LLAMA_SHAPES["qwen2.5-1.5b"], "max_position_embeddings": 4096, "tie_word_embeddings": False},
    "small": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 4, "num_attention_heads": 16,
        "num_key_value_heads": 4, "vocab_size": 4096, "max_position_embeddings": 4096,
    },
    "tiny": {
        "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 4, "vocab_size": 512, "max_position_embeddings": 4096,
    },
}  # fmt: skip
CLI = [sys.executable, "-m", "vllm.entrypoints.cli.main"]
RANDOM = "random tokens"
GPU_WORK = {"kernel", "gpu_memcpy", "gpu_memset"}
"""Categories of a profiler's events in which a GPU works."""
PROFILED_STEPS = 32
"""Of each batch size, by `--gpu-time`."""
STARTED, ROUND_ENDED, ROWS = "ENGINE STARTED", "ROUND ENDED", "rows"
ENDS_IN_S = 60
"""For how long an engine may take to end."""
WORKER_ENVIRONMENT = {**os.environ, "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
"""Output carries rows alone, as the pipe of a process that nobody reads yet must not fill."""
DENSE_MOST_CAPTURED = 512
"""Tokens of a step up to which vLLM captures graphs by itself."""
PROBE_LOOPS, PROBES = 200_000, 5
"""Of the loop that times a CPU."""
GRAPHS = re.compile(r"Graph capturing finished in (\d+) secs, took (-?[\d.]+) GiB")
"""What vLLM says of its CUDA graphs."""


@torch.no_grad()
def write_shape(name: str, arguments: argparse.Namespace, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Writes the dense folder of a shape and a sparse one for each sparsity; what to measure, the dense one first.

    The sparse folders share the dense one's weights. Where an earlier call has left all that is asked for, it is taken.
    """
    work, sparsities = arguments.work, arguments.sparsities
    made = {"dtype": arguments.dtype, "tokenizer": arguments.tokenizer}
    marker = work / f"{name}.json"
    if marker.exists() and (before := json.loads(marker.read_text(encoding="utf-8")))["made"] == made:
        found = {job["sparsity"]: job for job in before["jobs"]}
        if set(sparsities) <= set(found):
            return [found[sparsity] for sparsity in (None, *sparsities)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dense = work / f"{name}-dense"
    model = random_model(transformers.LlamaConfig(**SHAPES[name]), device, dtype)
    model.save_pretrained(dense, max_shard_size="1TB")
    jobs = [{"model": f"{name} dense", "folder": str(dense), "sparsity": None}]
    lte.sparsify_(model, lte.LteConfig(grouping="contiguous"))
    ffns = list(lte.sparse_ffns(model).values())
    generator = torch.Generator(device).manual_seed(0)
    for ffn in ffns:
        ffn.router.weight.normal_(std=ffn.router.weight.shape[1] ** -0.5, generator=generator)
    for sparsity in sparsities:
        active = 1 - sparsity
        # The hidden states have RMS 1, so the logits are near N(bias, 1).
        bias = ALWAYS_ON_LOGIT if active == 1 else statistics.NormalDist().inv_cdf(active)
        for ffn in ffns:
            ffn.router.bias.fill_(bias)
        measured = {"sparsity": sparsity, "tokens": 0, "active_fraction": [active] * len(ffns)}
        model.config.lte_measurement = measured
        folder = work / f"{name}-{sparsity:g}"
        shutil.rmtree(folder, ignore_errors=True)
        save_routers(model, folder, dense / "model.safetensors")
        jobs.append({"model": f"{name} forced", "folder": str(folder), "sparsity": sparsity})
    if arguments.tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
        for job in jobs:
            tokenizer.save_pretrained(job["folder"])
    write_json_atomic(marker, {"made": made, "jobs": jobs})
    return jobs


def save_routers(model: Any, folder: Path, dense: Path) -> None:
    """Saves a sparse model whose other weights are in the file of the dense one, to which the folder links."""
    state = model.state_dict()
    model.save_pretrained(folder, state_dict={key: value for key, value in state.items() if ".router." in key})
    files = [folder / f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    (folder / "lte_checksums.json").unlink()  # of one whole file
    files[0].symlink_to(dense.resolve())
    (folder / "model.safetensors").rename(files[1])
    weight_map = {key: files[".router." in key].name for key in state}
    index = {"metadata": {}, "weight_map": weight_map}
    write_json_atomic(folder / "model.safetensors.index.json", index)


def write_densified(folders: Sequence[Path], work: Path) -> list[dict[str, Any]]:
    """Writes the dense copy of the first of some trained folders; what to measure, the dense one first."""
    folder = folders[0]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    lte.densify_(model)
    dense = work / f"{folder.name}-dense"
    model.save_pretrained(dense)
    AutoTokenizer.from_pretrained(folder).save_pretrained(dense)
    del model
    gc.collect()
    jobs = [{"model": f"{folder.name} dense", "folder": str(dense), "sparsity": None}]
    for folder in folders:
        measured = getattr(AutoConfig.from_pretrained(folder), "lte_measurement", None) or {}
        jobs.append({"model": folder.name, "folder": str(folder), "sparsity": measured.get("sparsity")})
    return jobs


def engine_options(job: dict[str, Any]) -> dict[str, Any]:
    """Of `vllm.LLM`, the same for dense and sparse."""
    options = {
        "dtype": job["dtype"],
        "max_model_len": max(job["input_len"] + job["output_len"], *job["prompt_lens"], 0) + 16,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "enforce_eager": job["eager"],
        "tensor_parallel_size": job["tensor_parallel"],
    }
    options |= memory_options(job)
    if job["tool"] == "throughput":
        return options
    options["max_num_seqs"] = max(*job["batches"], 16)
    if job["gpu_time"]:
        own = {"torch_profiler_with_stack": False, "torch_profiler_dump_cuda_time_total": False}
        options["profiler_config"] = {"profiler": "torch", "torch_profiler_dir": job["traces"], **own}
    if job["cuda"]:
        prompts = [*(batch * job["input_len"] for batch in job["batches"]), *job["prompt_lens"]]
        sizes = {*job["batches"], *(tokens for tokens in prompts if tokens <= job["most_captured"])}
        graphs = {"cudagraph_capture_sizes": sorted(sizes)}
        return options if job["eager"] else {**options, "compilation_config": graphs}
    return options


def captured_by_itself(job: dict[str, Any]) -> int:
    """Tokens of a prompt up to which vLLM captures graphs unless told otherwise, of many sequences at once."""
    if job["model"].endswith(" dense"):
        return DENSE_MOST_CAPTURED
    config = AutoConfig.from_pretrained(job["folder"])
    neurons = serve_settings(config).num_neurons // job["tensor_parallel"]
    return max(DENSE_MOST_CAPTURED, longest_prompt(config.hidden_size, neurons))


def memory_options(job: dict[str, Any]) -> dict[str, Any]:
    """A given size of the cache, which saves the profiling of memory, and so much of the start."""
    size = (16 << 30) if job["cuda"] else (512 << 20)
    return {"kv_cache_memory_bytes": size, "gpu_memory_utilization": 0.6 / job["engines"]}


def job_environment(job: dict[str, Any]) -> dict[str, str]:
    """The environment of a job's engine: those that start at the same time compile into folders of their own."""
    if job["engines"] == 1:
        return dict(os.environ)
    own = "-".join(Path(job["folder"]).resolve().parts[1:])
    return {**os.environ, "VLLM_CACHE_ROOT": str(Path(job["caches"]) / own)}


def sampled() -> dict[str, float]:
    """Sums and counts of what the plug-in has sampled of the routing so far."""
    from lte.vllm.meter import _collector

    found: dict[str, float] = {}
    for family in _collector().collect():
        for sample in family.samples:
            name = f"steps_{sample.labels['path']}" if "path" in sample.labels else sample.name
            found[name] = found.get(name, 0) + sample.value
    return found


def since(before: dict[str, float]) -> dict[str, float]:
    """What was sampled since an earlier `sampled`."""
    return {name: value - before[name] for name, value in sampled().items()}


def saving(counts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean active fraction and union, and the steps by path, of some `since`; empty for a dense model."""
    found = dict[str, float]()
    total = {name: sum(each[name] for each in counts) for name in counts[0]}
    for name in ("active_fraction", "union_fraction"):
        count = total.get(f"lte:{name}_count")
        if count:
            found[name] = total[f"lte:{name}_sum"] / count
            found["samples"] = count
    return {**found, **{name: number for name, number in total.items() if name.startswith("steps_") and number}}


def pieces(ids: Sequence[int], count: int, length: int) -> list[Sequence[int]]:
    """Pieces of a text's tokens, whose beginnings are spread over all of it.

    Raises:
        ValueError: if the text has fewer than `count` places for them.
    """
    places = len(ids) - length + 1
    if places < count:
        raise ValueError(f"text must hold {length + count - 1} tokens or more, got {len(ids)}; give a longer one")
    return [ids[start : start + length] for start in (index * places // count for index in range(count))]


def text_tokens(job: dict[str, Any]) -> list[int]:
    """The text of a folder's job by the folder's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(job["folder"])
    text = read_text(None if job["text"] is None else Path(job["text"]))
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def prompt_maker(job: dict[str, Any], vocab: int) -> Callable[[int, int], list[Any]]:
    """What makes so many prompts of a length, as `vllm.LLM` takes them."""
    text = None if job["prompts"] == RANDOM else text_tokens(job)

    def make(count: int, length: int) -> list[Any]:
        ids = random_ids(vocab, count, length, count).tolist() if text is None else pieces(text, count, length)
        return [{"prompt_token_ids": row} for row in ids]

    return make


def text_prompts(job: dict[str, Any], count: int) -> list[str]:
    """Prompts of a folder as text, which are read as about `input_len` tokens."""
    tokenizer = AutoTokenizer.from_pretrained(job["folder"])
    return [tokenizer.decode(ids) for ids in pieces(text_tokens(job), count, job["input_len"])]


def answer_ms(llm: Any, prompts: list[Any], tokens: int) -> float:
    """Milliseconds until all prompts, together, are answered by so many tokens each."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return 1000 * (time.perf_counter() - start)


def gpu_ms(llm: Any, prompts: list[Any], tokens: int, traces: Path) -> float:
    """Milliseconds that a GPU works, the mean over those that share the model, for answers of so many tokens.

    Kernels that run at the same time count one by one.

    Raises:
        ValueError: if the profiler saw no work of a GPU.
    """
    before = set(traces.glob("*.json.gz"))
    llm.start_profile()
    answer_ms(llm, prompts, tokens)
    llm.stop_profile()
    written = set(traces.glob("*.json.gz")) - before
    found = [json.loads(gzip.decompress(file.read_bytes()))["traceEvents"] for file in written]
    total = sum(event["dur"] for events in found for event in events if event.get("cat") in GPU_WORK)
    if not total:
        raise ValueError(f"traces must hold work of a GPU, got none in {len(written)} files of {traces}")
    return total / 1000 / len(written)


def fastest_cpus(count: int) -> tuple[list[int], float]:
    """The CPUs, of those that this process may use, on which Python is fastest now, each of another core.

    Args:
        count: how many; 0 for none, which `pin` takes for leaving all as it is.

    Returns:
        The CPUs, and how many milliseconds a loop of Python takes on the slowest of them, or wherever this runs.

    Raises:
        ValueError: if there are fewer cores.
    """
    if not count:
        return [], min(_probe() for _ in range(PROBES))
    allowed, taken, found = os.sched_getaffinity(0), set[int](), list[int]()
    times = {}
    try:
        for cpu in sorted(allowed):
            os.sched_setaffinity(0, {cpu})
            times[cpu] = min(_probe() for _ in range(PROBES))
    finally:
        os.sched_setaffinity(0, allowed)
    for cpu in sorted(times, key=lambda cpu: times[cpu]):
        if cpu not in taken and len(found) < count:
            found.append(cpu)
            taken |= _siblings(cpu)
    if len(found) < count:
        raise ValueError(f"cpus must be at most the number of cores, {len(found)}, got cpus={count}")
    return sorted(found), max(times[cpu] for cpu in found)


def _probe() -> float:
    start = time.perf_counter()
    for _ in range(PROBE_LOOPS):
        pass
    return 1000 * (time.perf_counter() - start)


def _siblings(cpu: int) -> set[int]:
    """The CPUs of the same core."""
    file = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    try:
        parts = [part.split("-") for part in file.read_text(encoding="ascii").strip().split(",")]
    except OSError:
        return {cpu}
    return {cpu}.union(*(range(int(part[0]), int(part[-1]) + 1) for part in parts))


def pin(process: int, cpus: Sequence[int]) -> None:
    """Has a process, its threads and all that it has started run on these CPUs alone; none leaves them as they are."""
    for task in Path(f"/proc/{process}/task").glob("*") if cpus else ():
        with contextlib.suppress(OSError):  # it may end meanwhile
            os.sched_setaffinity(int(task.name), cpus)
            for child in (task / "children").read_text(encoding="ascii").split():
                pin(int(child), cpus)


def spread(name: str, times: list[float]) -> dict[str, float]:
    """The median of times under a name, and between which of them three fifths lie."""
    times = sorted(times)
    outer = {f"{name}_p20": times[len(times) // 5], f"{name}_p80": times[-1 - len(times) // 5]}
    return {name: statistics.median(times), **outer}


def one_round(llm: Any, job: dict[str, Any], make_prompts: Callable[[int, int], list[Any]]) -> list[dict[str, Any]]:
    """The times of what a tool measures, once, and what was sampled of the routing meanwhile.

    Of `latency` a row for each batch size and each single prompt, of `throughput` one.
    """
    found = list[dict[str, Any]]()
    lengths = {"input_len": job["input_len"], "output_len": job["output_len"]}
    if job["tool"] == "throughput":
        prompts = make_prompts(job["num_prompts"], job["input_len"])
        answer_ms(llm, prompts, 2)  # warms up
        before = sampled()
        elapsed_s = answer_ms(llm, prompts, job["output_len"]) / 1000
        own = {"tool": "throughput", **lengths, "num_prompts": job["num_prompts"]}
        return [{**own, "elapsed_s": elapsed_s, "since": since(before)}]
    for batch in job["batches"]:
        prompts = make_prompts(batch, job["input_len"])
        for tokens in (1, job["output_len"]):
            answer_ms(llm, prompts, tokens)
        # After these steps: what was sampled of the batch size before arrives with the first sample of this one.
        before = sampled()
        short, long = (answer_ms(llm, prompts, tokens) for tokens in (1, job["output_len"]))
        step = (long - short) / (job["output_len"] - 1)
        own = {"tool": "latency", "batch": batch, **lengths}
        found.append({**own, "ms_first_token": short, "ms_per_step": step, "since": since(before)})
    for length in job["prompt_lens"]:
        prompts = make_prompts(1, length)
        answer_ms(llm, prompts, 1)  # warms up
        captured = job["cuda"] and not job["eager"] and length <= job["most_captured"]
        own = {"tool": "prompt", "batch": 1, "input_len": length, "output_len": 1, "graph": captured}
        found.append({**own, "ms_first_token": answer_ms(llm, prompts, 1)})
    return found


def joined(rounds: Sequence[Sequence[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """The rows of all rounds as one each: medians and spreads, and the times themselves."""
    times = "ms_first_token", "ms_per_step", "elapsed_s"
    for rows in zip(*rounds, strict=True):
        row = {key: value for key, value in rows[0].items() if key not in ("since", *times)}
        for name in times:
            if name in rows[0]:
                row |= spread(name, [each[name] for each in rows]) | {f"{name}_rounds": [each[name] for each in rows]}
        if "elapsed_s" in row:
            row["tokens_per_second"] = row["num_prompts"] * (row["input_len"] + row["output_len"]) / row["elapsed_s"]
        yield row | (saving([each["since"] for each in rows]) if "since" in rows[0] else {})


def measure_engine() -> None:
    """Waits for a job as a line of the input and starts its engine; then measures one round for each further line.

    The line `ROWS` has it print the rows and end. It runs in a process of its own, and the engine in another one, as
    when it serves: scheduling and steps overlap.
    """
    from vllm import LLM

    # By an exit, at which vLLM ends its engine. Where a shell has started all in the background SIGINT is ignored.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    job = json.loads(sys.stdin.readline())
    os.environ.update(job_environment(job))
    job["most_captured"] = job["most_captured"] or captured_by_itself(job)
    start = time.perf_counter()
    llm: Any = LLM(job["folder"], **engine_options(job))
    start_s = time.perf_counter() - start
    print(f"\n{STARTED}", flush=True)
    config = llm.llm_engine.vllm_config
    vocab, second = config.model_config.get_vocab_size(), getattr(config, "use_v2_model_runner", False)
    make_prompts, rounds, speeds = prompt_maker(job, vocab), list[list[dict[str, Any]]](), list[float]()
    while (line := sys.stdin.readline().strip()) != ROWS:
        if not line:
            return  # who asked has ended
        speeds.append(float(line))
        rounds.append(one_round(llm, job, make_prompts))
        print(f"\n{ROUND_ENDED}", flush=True)  # something may stand in the line
    common = {"model_runner": 2 if second else 1, "start_s": start_s, **spread("cpu_loop_ms", speeds)}
    for row in joined(rounds):
        print("ROW " + json.dumps({**row, **common}), flush=True)
    for batch in job["batches"] if job["gpu_time"] and job["tool"] == "latency" else ():
        prompts = make_prompts(batch, job["input_len"])
        short, long = (gpu_ms(llm, prompts, tokens, Path(job["traces"])) for tokens in (1, 1 + PROFILED_STEPS))
        gpu_row = {"tool": "gpu", "batch": batch, "gpu_ms_per_step": (long - short) / PROFILED_STEPS}
        print("ROW " + json.dumps(gpu_row), flush=True)


class Listener(threading.Thread):
    """Hands on what a process says, and keeps what vLLM says of its graphs: seconds, and GiB of a GPU's memory."""

    def __init__(self, process: subprocess.Popen[str]):
        super().__init__(daemon=True)
        self._process, self.graphs = process, dict[str, float]()

    def run(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            if (found := GRAPHS.search(line)) is not None:
                self.graphs = {"graphs_s": int(found[1]), "graphs_gib": float(found[2])}


class EngineWorkers:
    """Processes that measure one job each.

    The next one imports vLLM while the engine of a job starts; with `together` all engines start at the beginning, and
    take turns in each round.
    """

    def __init__(self, jobs: Sequence[dict[str, Any]], together: bool):
        self._left = list(jobs)
        self._processes: list[subprocess.Popen[str]] = []
        self._listeners: dict[int, Listener] = {}
        self._together, self._measured = together, False
        with _ended_by_errors(self):
            for _ in self._left if together else self._left[:1]:
                self._start()
            if together:
                for job, process in zip(self._left, self._processes, strict=True):
                    _tell(process, json.dumps(job))
                for process in self._processes:
                    _read_until(process, STARTED)

    def _start(self) -> None:
        command, pipe = [sys.executable, __file__, "--worker"], subprocess.PIPE
        options: dict[str, Any] = {"text": True, "errors": "replace", "env": WORKER_ENVIRONMENT}
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, **options)
        self._processes.append(process)
        self._listeners[process.pid] = Listener(process)
        self._listeners[process.pid].start()

    def _rounds(self, jobs: Sequence[dict[str, Any]], processes: Sequence[subprocess.Popen[str]]) -> None:
        for _ in range(jobs[0]["repeats"]):
            for job, process in zip(jobs, processes, strict=True):
                cpus, loop_ms = fastest_cpus(job["cpus"])
                pin(process.pid, cpus)
                _tell(process, str(loop_ms))
                _read_until(process, ROUND_ENDED)

    def run(self, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The rows of `measure_engine`; jobs come in the order in which they were given.

        Raises:
            subprocess.CalledProcessError: if the process failed.
        """
        if self._left[0] != job:
            raise ValueError(f"job must be the next of those that were given, got job={job['folder']}")
        if self._together and not self._measured:
            self._measured = True
            self._rounds(list(self._left), list(self._processes))
        self._left.pop(0)
        process = self._processes.pop(0)
        try:
            if not self._together:
                if self._left:
                    self._start()
                _tell(process, json.dumps(job))
                _read_until(process, STARTED)
                self._rounds([job], [process])
            _tell(process, ROWS)
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("ROW "):
                    yield {**json.loads(line[4:]), **self._listeners[process.pid].graphs}
                else:
                    print(line, end="", file=sys.stderr, flush=True)
            if process.wait():
                raise subprocess.CalledProcessError(process.returncode, process.args)
        finally:
            _end(process)

    def close(self) -> None:
        """Ends the processes that have measured nothing."""
        for process in self._processes:
            _end(process, waits=True)
        self._processes.clear()


def _end(process: subprocess.Popen[Any], waits: bool = False) -> None:
    """Ends a process, if it goes on, in a way in which its engine ends with it: killed, it would leave that running.

    For a worker that waits the end of its input is enough.
    """
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
    if not waits and process.poll() is None:
        process.terminate()
    try:
        process.wait(ENDS_IN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def _ended_by_errors(tool: EngineWorkers | Servers) -> Iterator[None]:
    """Ends what a tool has started where it is stopped before it is made."""
    try:
        yield
    except BaseException:
        tool.close()
        raise


def _tell(process: subprocess.Popen[str], line: str) -> None:
    """Writes a line to a process, which may have ended."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(line + "\n")
        process.stdin.flush()


def _read_until(process: subprocess.Popen[str], wanted: str) -> None:
    """Reads on until a line, or until the process has ended."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == wanted:
            return
        print(line, end="", file=sys.stderr, flush=True)


def cli_flags(job: dict[str, Any]) -> list[str]:
    """The flags that dense and sparse engines of `vllm bench` share."""
    most = job["input_len"] + job["output_len"] + 16
    flags = ["--model", job["folder"], "--dtype", job["dtype"], "--max-model-len", str(most)]
    flags += ["--tensor-parallel-size", str(job["tensor_parallel"])]
    for name, value in memory_options(job).items():
        flags += ["--" + name.replace("_", "-"), str(value)]
    return [*flags, "--no-enable-prefix-caching", *(["--enforce-eager"] if job["eager"] else [])]


def random_flags(job: dict[str, Any]) -> list[str]:
    """Has `vllm bench` make random prompts."""
    lengths = ["--random-input-len", str(job["input_len"]), "--random-output-len", str(job["output_len"])]
    return ["--dataset-name", "random", *lengths]


def custom_flags(job: dict[str, Any], work: Path, count: int) -> list[str]:
    """Has `vllm bench serve` read text."""
    file = work / "prompts.jsonl"
    lines = (json.dumps({"prompt": prompt}) + "\n" for prompt in text_prompts(job, count))
    file.write_text("".join(lines), encoding="utf-8")
    flags = ["--dataset-name", "custom", "--dataset-path", str(file), "--custom-output-len", str(job["output_len"])]
    return [*flags, "--skip-chat-template"]


class Servers:
    """`vllm bench serve` against a server of each job; with `together` all servers start at the beginning."""

    def __init__(self, jobs: Sequence[dict[str, Any]], together: bool, work: Path):
        self._work = work
        self._running: dict[str, tuple[subprocess.Popen[bytes], str]] = {}
        with _ended_by_errors(self):
            for job in jobs if together else ():
                self._start(job)
            for process, port in list(self._running.values()):
                _wait_for(process, port)

    def _start(self, job: dict[str, Any]) -> tuple[subprocess.Popen[bytes], str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *cli_flags(job), "--port", port]
        self._running[job["folder"]] = subprocess.Popen(command, env=job_environment(job)), port
        return self._running[job["folder"]]

    def run(self, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """A row for each number of requests at once.

        Raises:
            ValueError: if the server did not start.
            subprocess.CalledProcessError: if the requests failed.
        """
        server, port = self._running.get(job["folder"]) or self._start(job)
        try:
            if not _wait_for(server, port):
                raise ValueError(f"the server must start, got exit status {server.returncode}")
            for batch in job["batches"]:
                cpus, loop_ms = fastest_cpus(job["cpus"])
                pin(server.pid, cpus)
                output, count = self._work / "serve.json", max(4 * batch, 8)
                prompts = random_flags(job) if job["prompts"] == RANDOM else custom_flags(job, self._work, count)
                command = [*CLI, "bench", "serve", "--model", job["folder"], "--port", port, "--ignore-eos", *prompts]
                command += ["--max-concurrency", str(batch), "--num-prompts", str(count)]
                command += ["--save-result", "--result-filename", str(output)]
                subprocess.run(command, check=True)
                found = json.loads(output.read_text(encoding="utf-8"))
                kept = {key: value for key, value in found.items() if isinstance(value, int | float)}
                yield {"tool": "serve", "batch": batch, "cpu_loop_ms": loop_ms, **kept}
        finally:
            _end(server)

    def close(self) -> None:
        """Ends all servers."""
        for server, _ in self._running.values():
            _end(server)


def _wait_for(server: subprocess.Popen[bytes], port: str) -> bool:
    """Waits until a server answers; False where it ended."""
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
        except OSError:
            time.sleep(1)
        else:
            return True
    return False


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Adds to each row its time over that of the dense model of the same group, batch size and prompt, by rounds."""
    keys = {
        "latency": "ms_per_step", "prompt": "ms_first_token", "gpu": "gpu_ms_per_step", "serve": "median_tpot_ms",
        "throughput": "elapsed_s",
    }  # fmt: skip

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["group"], row["tool"], row.get("batch"), row["input_len"]

    dense = {place(row): row for row in rows if row["sparsity"] is None}
    for row in rows:
        base, key = dense.get(place(row)), keys[row["tool"]]
        if base is None or row["sparsity"] is None or not base.get(key):
            continue
        pairs = zip(row.get(f"{key}_rounds", ()), base.get(f"{key}_rounds", ()), strict=False)
        ratios = [own / other for own, other in pairs]
        row |= spread("over_dense", ratios) if ratios else {"over_dense": row[key] / base[key]}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shape", choices=list(SHAPES), action="append", default=[])
    parser.add_argument("--folder", type=Path, action="append", default=[])
    parser.add_argument(
        "--one-baseline",
        action="store_true",
        help="folders share a shape: compare all of them with the first one's dense copy",
    )
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.0, 0.5, 0.8, 0.9])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--text", type=Path, help="plain text for the prompts of folders; unset: Python's own help")
    parser.add_argument("--tools", nargs="+", choices=["latency", "throughput", "serve"], default=["latency"])
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=129)
    parser.add_argument("--prompt-lens", type=int, nargs="*", default=[], help="single prompts that latency times, too")
    parser.add_argument(
        "--most-captured",
        type=int,
        help=f"tokens up to which all have graphs; unset: {DENSE_MOST_CAPTURED}, sparse more if they are small",
    )
    parser.add_argument("--cpus", type=int, default=0, help="CPUs that an engine has while it is measured; 0: all")
    parser.add_argument("--gpu-time", action="store_true", help="how long a GPU works in a step, beside latency")
    parser.add_argument("--num-prompts", type=int, default=1024, help="of throughput")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="GPUs that share each model, dense and sparse")
    parser.add_argument("--together", action="store_true", help="engines of a group start at the same time and stay")
    parser.add_argument("--eager", action="store_true", help="no graphs and no compilation, for a dry run")
    parser.add_argument("--work", type=Path, default=Path("vllm_bench"), help="folder for the models that it writes")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--write-only", action="store_true", help="write the folders of the shapes, and end")
    parser.add_argument("--tokenizer", help="folder whose tokenizer a shape gets: throughput and serve need one")
    return parser.parse_args()


def measuring(tool: str, jobs: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> EngineWorkers | Servers:
    """What measures the jobs of a group by a tool, one after the other."""
    if tool == "serve":
        return Servers(jobs, arguments.together, arguments.work)
    return EngineWorkers([{**job, "tool": tool} for job in jobs], arguments.together)


def main() -> None:
    """Measures group after group and writes the rows so far after each one; what fails is named in the record.

    `engines` of a row is how many of them had started at the same time, and wait while one is measured.
    """
    arguments = parse()
    if arguments.worker:
        measure_engine()
        return
    if arguments.folder:
        read_text(arguments.text)  # says now, and not after hours, that there is none
    names = ("batches", "input_len", "output_len", "prompt_lens", "num_prompts", "repeats", "dtype", "eager")
    common = {
        name: getattr(arguments, name) for name in (*names, "tensor_parallel", "gpu_time", "cpus", "most_captured")
    }
    common["cuda"] = torch.cuda.is_available()
    common["traces"] = str((arguments.work / "traces").resolve())
    common["caches"] = str((arguments.work / "caches").resolve())
    common["text"] = None if arguments.text is None else str(arguments.text)
    dtype = getattr(torch, arguments.dtype)
    fastest_cpus(arguments.cpus)  # says at once if there are fewer
    work, writers = arguments.work, list[tuple[str, Callable[[], list[dict[str, Any]]]]]()
    work.mkdir(parents=True, exist_ok=True)
    for name in arguments.shape:
        writers.append((name, functools.partial(write_shape, name, arguments, dtype)))
    paths = arguments.folder
    for folders in [paths] if arguments.one_baseline and paths else [[path] for path in paths]:
        writers.append((str(folders[0]), functools.partial(write_densified, folders, work)))
    # All written first, as one process cannot give a GPU's memory back while it lives.
    jobs = [{**own, **common, "group": group} for group, write in writers for own in write()]
    groups = [list(own) for _, own in itertools.groupby(jobs, lambda job: job["group"])]
    for group in groups:
        for job in group:
            job["prompts"] = RANDOM if job["group"] in SHAPES else text_name(arguments.text)
            job["engines"] = len(group) if arguments.together else 1
    if arguments.write_only:
        return
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
    rows: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    for group, tool in itertools.product(groups, arguments.tools):
        with contextlib.closing(measuring(tool, group, arguments)) as tools:
            for job in ({**each, "tool": tool} for each in group):
                kept = ("group", "model", "sparsity", "dtype", "input_len", "output_len", "tensor_parallel", "prompts")
                own = {key: job[key] for key in (*kept, "engines", "cpus")}
                try:
                    for row in tools.run(job):
                        rows.append({**own, **row})
                        add_ratios(rows)
                        print(json.dumps(rows[-1]), flush=True)
                        write_record(arguments.output, rows, failed)
                except (subprocess.SubprocessError, OSError, ValueError) as error:
                    failed.append({**own, "tool": tool, "error": f"{type(error).__name__}: {error}"})
                    write_record(arguments.output, rows, failed)
    if failed:
        raise SystemExit(f"{len(failed)} of {len(jobs) * len(arguments.tools)} measurements failed: {failed}")


def vllm_version() -> str:
    """Of the installed vLLM, whose distributions for CPUs have names of their own."""
    return version(next(iter(packages_distributions()["vllm"])))


def write_record(output: Path | None, rows: list[dict[str, Any]], failed: list[dict[str, Any]]) -> None:
    """Writes the rows so far, as a long run may be cut short."""
    if output is not None:
        record = {**environment(), "vllm": vllm_version(), "rows": rows}
        record |= {"failed": failed} if failed else {}
        write_json_atomic(output, record)


if __name__ == "__main__":
    main()
