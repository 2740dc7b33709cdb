"""What training with LTE costs beside the same training without it: time, memory and use of the GPU, in both stages.

A model of a known shape with random weights, made on the device, trains on random tokens by `lte.LteTrainer`: all of
its weights (`full`), LoRA adapters (`lora`), or adapters over weights in 4 bits (`qlora`). Once with the recipe `dense`
on the stock model, once with LTE, in both stages; batch, optimiser, checkpointing and teacher are the same.

    python benchmarks/training_speed.py --output results/training_speed_7b.json
    python benchmarks/training_speed.py --shape qwen2.5-1.5b --teacher --output results/training_speed_1_5b.json

On several GPUs whole in each process, or in shards of FSDP2, which bitsandbytes' optimisers do not take:

    torchrun --nproc-per-node 2 benchmarks/training_speed.py --shape qwen2.5-1.5b --kinds full --output OUT
    accelerate launch --config_file src/lte/launch/fsdp2.yaml --num_processes 2 benchmarks/training_speed.py \\
        --kinds full --optim adamw_torch_fused --output OUT

`--profiled-steps 2` has a profiler watch the last steps of each stage, which are then not counted: a row says for how
long a GPU, or a CPU where there is none, worked in a step, and in which kernels, and before which kernels a GPU waited.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import DeviceType
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

import lte
from lte.bench.shapes import SHAPES, random_model, shape_config
from lte.bench.timing import Times
from lte.data.rows import TokenRows
from lte.eval.flops import flops_per_token
from lte.files import write_json_atomic
from lte.records import environment
from lte.runs.memory import free_memory
from lte.train.config import Optim, TrainConfig
from lte.train.memory import estimate_memory
from lte.train.optimisers import optimiser_arguments
from lte.train.processes import float32_products, is_main_process, num_processes, training_device
from lte.train.two_stage import training_arguments

KINDS = ("full", "lora", "qlora")
# Products of dense bf16 matrices per second, without sparsity, by what a GPU's name holds: NVIDIA's data sheets.
PEAK_FLOPS = {"H200": 989.5e12, "H100 80GB HBM3": 989.5e12, "A100": 312e12, "B200": 2250e12}

KERNELS = 40
"""How many of the longest a row names."""
SHORTEST_WAIT_US = 20
"""A shorter one lies between any two kernels."""


class StepClock(TrainerCallback):
    """Notes when each step begins, and the peak of memory until then; the first steps of a stage are not counted.

    On a GPU a step begins when the GPU has done what was asked of it before. The host waits for that as little as in
    other trainings.

    Args:
        steps: of each stage.
        warm_up: of these, those that are left out, with the last one, which nothing follows.
        profiled: the last ones of these, which are left out, too; the clock goes on until the first of them begins.
    """

    def __init__(self, steps: int, warm_up: int, profiled: int = 0):
        self.steps, self.warm_up = steps, warm_up
        self._after = max(0, profiled - 1)
        self.begins: list[Any] = []
        self.peaks: list[int] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not torch.cuda.is_available():
            self.begins.append(time.perf_counter())
            return
        self.peaks.append(torch.cuda.max_memory_allocated())
        if state.global_step % self.steps in (0, self.warm_up):
            torch.cuda.reset_peak_memory_stats()
        self.begins.append(torch.cuda.Event(enable_timing=True))
        self.begins[-1].record()

    def samples_ms(self, stage: int) -> list[float]:
        """Milliseconds of each counted step of a stage."""
        end = stage * self.steps - self._after
        return [_milliseconds(*pair) for pair in itertools.pairwise(self.begins[:end][-self._counted :])]

    def peak_bytes(self, stage: int) -> int | None:
        """The peak of memory in the counted steps of a stage, on the process's GPU; `None` on a CPU."""
        return self.peaks[stage * self.steps - 1] if self.peaks else None

    def first_peak_bytes(self) -> int | None:
        """The peak before the first counted step: that of fitting routers and of warming up."""
        return max(self.peaks[: self.warm_up + 1]) if self.peaks else None

    @property
    def _counted(self) -> int:
        return self.steps - self.warm_up - self._after


def _milliseconds(before: Any, after: Any) -> float:
    """Between two events of a GPU, or two times in seconds."""
    if isinstance(before, float):
        return 1e3 * (after - before)
    after.synchronize()
    return before.elapsed_time(after)


class KernelProfile(TrainerCallback):
    """Has a profiler watch the last steps of each stage.

    Args:
        steps: of each stage.
        profiled: of these, the last ones; 0 for none.

    Attributes:
        stages: what was found in each, as `kernel_times` has it.
    """

    def __init__(self, steps: int, profiled: int):
        self.steps, self.profiled = steps, profiled
        self.stages: list[dict[str, Any]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.profiled and state.global_step % self.steps == self.steps - self.profiled:
            self._profiler = torch.profiler.profile()
            self._profiler.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.profiled and state.global_step % self.steps == 0:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._profiler.stop()
            found = kernel_times(self._profiler.key_averages(), self.profiled)
            if torch.cuda.is_available():
                found |= idle_times(self._profiler.events() or (), self.profiled)
            self.stages.append(found)


def kernel_times(events: Iterable[Any], steps: int) -> dict[str, Any]:
    """Milliseconds of a step that a device worked, those of its longest kernels, and how often each ran.

    Kernels that run at the same time, sums over processes beside products say, count one by one.
    """
    on_gpu = torch.cuda.is_available()
    taken = [(each.self_device_time_total if on_gpu else each.self_cpu_time_total, each) for each in events]
    # On a GPU the operations that launch kernels are events as well, of the CPU, and so is the time from the first to
    # the last kernel of what has a name: an optimiser's step, or a compiled region.
    kernels = [
        (us, each)
        for us, each in taken
        if us and (each.device_type == DeviceType.CUDA) == on_gpu and not (on_gpu and each.is_user_annotation)
    ]
    longest = sorted(kernels, key=lambda pair: -pair[0])[:KERNELS]
    return {
        "device_ms": sum(us for us, _ in kernels) / 1e3 / steps,
        "kernels": [
            {"name": each.key[:120], "ms": us / 1e3 / steps, "calls": each.count / steps} for us, each in longest
        ],
    }


def idle_times(events: Iterable[Any], steps: int) -> dict[str, Any]:
    """Milliseconds of a step in which a GPU waited, `SHORTEST_WAIT_US` or more at a time, and before which kernels.

    Of several profiled steps also the time between them counts. The profiler itself makes the host slower.
    """
    kernels = sorted(
        (each.time_range.start, each.time_range.end, each.name)
        for each in events
        if each.device_type == DeviceType.CUDA and not each.is_user_annotation
    )
    waits: dict[str, list[float]] = {}
    busy_until = kernels[0][0] if kernels else 0.0
    for start, end, name in kernels:
        if start - busy_until >= SHORTEST_WAIT_US:
            waits.setdefault(name[:120], []).append(start - busy_until)
        busy_until = max(busy_until, end)
    longest = sorted(waits.items(), key=lambda item: -sum(item[1]))[:KERNELS]
    return {
        "idle_ms": sum(map(sum, waits.values())) / 1e3 / steps,
        "idle": [{"before": name, "ms": sum(each) / 1e3 / steps, "waits": len(each) / steps} for name, each in longest],
    }


def make_config(args: argparse.Namespace, kind: str, recipe: str) -> TrainConfig:
    """The settings as of `lte train`."""
    in_4_bits = kind == "qlora"
    return TrainConfig(
        recipe=recipe,  # type: ignore[arg-type]
        stage1_steps=args.steps,
        stage2_steps=args.steps,
        learning_rate=1e-5,
        # So that in so few steps they switch some experts off.
        router_learning_rate=1e-2,
        batch_size=args.batch,
        # Adapters are in fp32, whose products without autocast would take a third of the step.
        bf16=kind != "full" or args.weights_dtype == "float32",
        tf32=args.tf32,
        weights_dtype="float32" if in_4_bits else args.weights_dtype,
        optim=args.optim,
        gradient_checkpointing=args.checkpointing,
        compile=args.compile and not in_4_bits,
        distillation_weight=1.0 if args.teacher else 0.0,
        lora_rank=None if kind == "full" else args.lora_rank,
        lora_4bit=in_4_bits,
        calibration_tokens=0,
        dataloader_num_workers=0,
        logging_steps=args.steps,
        report_to="none",
    )


def make_model(args: argparse.Namespace, kind: str, sparse: bool) -> nn.Module:
    """A model with random weights on the device, of LTE or stock; the same ones each time."""
    config = make_config(args, kind, "dense")
    dtype = torch.bfloat16 if config.lora_4bit or config.weights_dtype == "bfloat16" else torch.float32
    model = random_model(shape_config(args.shape, args.layers), training_device(), dtype)
    if sparse:
        settings = lte.LteConfig(
            expert_size=args.expert_size, grouping="contiguous", target_sparsity=args.target_sparsity
        )
        model = lte.sparsify_(model, settings)
    return model


def pack_4_bits_(model: Any) -> None:
    """Turns the linear layers of the blocks into NF4 where they are, as loading with `load_in_4bit` would."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or module is head:
            continue
        sizes = (module.in_features, module.out_features, module.bias is not None)
        packed = Linear4bit(*sizes, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
        weight = Params4bit(module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=False)
        packed.weight, packed.bias = weight.to(module.weight.device), module.bias
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, packed)
    # By which peft knows it.
    model.is_loaded_in_4bit = True


def random_rows(args: argparse.Namespace) -> TokenRows:
    """As many rows of random tokens as both stages take."""
    vocabulary = SHAPES[args.shape]["vocab_size"]
    rows = 2 * args.steps * args.batch * num_processes()
    ids = np.random.default_rng(0).integers(vocabulary, size=(rows, args.length))
    return TokenRows(ids, ids)


def train(args: argparse.Namespace, kind: str, sparse: bool) -> dict[str, Any]:
    """Trains a new model through both stages; its clock, the sparsity of each stage, and what memory was expected."""
    from peft import LoraConfig

    config = make_config(args, kind, "straight_through" if sparse else "dense")
    model = make_model(args, kind, sparse)
    clock = StepClock(args.steps, args.warm_up, args.profiled_steps)
    profile = KernelProfile(args.steps, args.profiled_steps)
    teacher = make_teacher(args) if args.teacher else None
    estimate = estimate_memory(model, config, args.length, teacher)
    if config.lora_4bit:
        pack_4_bits_(model)
    adapters: Any = None
    if config.lora_rank:
        # As `lte train --lora-rank` makes them.
        alpha = 2 * config.lora_rank
        adapters = LoraConfig(r=config.lora_rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = random_rows(args)
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(config, Path(folder), len(rows))
        arguments.save_strategy, arguments.disable_tqdm = SaveStrategy.NO, True
        free_memory(compiled=config.compile)
        trainer = lte.LteTrainer(
            model, arguments, train_dataset=rows, teacher=teacher, peft_config=adapters, callbacks=[clock, profile]
        )
        with float32_products(config, trainer.model, teacher):
            trainer.train()
    active = {
        entry["stage"]: entry["active_fraction"] for entry in trainer.state.log_history if "active_fraction" in entry
    }
    sparsity = {stage: 1 - value for stage, value in active.items()}
    memory = {**asdict(estimate), "total": estimate.total}
    return {"clock": clock, "sparsity": sparsity, "estimate": memory, "profiles": profile.stages}


def make_teacher(args: argparse.Namespace) -> nn.Module:
    """The stock model in bf16, as `lte train` holds a teacher."""
    return random_model(shape_config(args.shape, args.layers), training_device(), torch.bfloat16)


def training_flops(config: Any, kind: str, length: int, teacher: bool = False) -> float:
    """FLOPs for each token that the training of the dense model needs: the same for LTE, so that ratios are of time.

    2 for each weight of a linear layer and of the head, 2 T A for each block of attention of width A over T causal
    tokens; twice that in the backward pass, where the weights under adapters get no gradient. A teacher has a forward
    pass. What is computed again, adapters and routers do not count.

    Args:
        config: of the model.
        kind: one of `KINDS`.
        length: T.
        teacher: whether there is one, of the same size.
    """
    linear = flops_per_token(config) + 2 * config.vocab_size * config.hidden_size
    width = config.num_attention_heads * (config.head_dim or config.hidden_size // config.num_attention_heads)
    scores = 2 * length * width * config.num_hidden_layers
    passes = 3 if kind == "full" else 2
    return passes * linear + 3 * scores + (linear + scores if teacher else 0)


def measure(args: argparse.Namespace, kind: str) -> list[dict[str, Any]]:
    """A row for each stage of the dense training and of LTE's; where memory is not enough, a row that says so."""
    found: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    notes: dict[bool, str] = {}
    for _, sparse in itertools.product(range(args.rounds), (False, True)):
        # What an earlier training left, one that failed, too, has no room beside the next model.
        free_memory(compiled=args.compile)
        if sparse in notes:
            continue
        try:
            found[sparse].append(train(args, kind, sparse))
        except torch.OutOfMemoryError as error:
            notes[sparse] = f"out of memory: {error}"[:400]
    free_memory(compiled=args.compile)
    kinds = [sparse for sparse in (False, True) if sparse not in notes]
    rows = [row(args, kind, sparse, stage, found[sparse]) for stage in (1, 2) for sparse in kinds]
    dense = {each["stage"]: each for each in rows if each["model"] == "dense"}
    for each in rows:
        beside, peak = dense.get(each["stage"]), each["peak_memory_bytes"]
        each["speed_over_dense"] = None if beside is None else beside["median_ms"] / each["median_ms"]
        known = beside is not None and peak is not None
        each["memory_over_dense"] = peak / beside["peak_memory_bytes"] if known else None
    return rows + [{"training": kind, "model": _name(sparse), "note": note} for sparse, note in notes.items()]


def row(args: argparse.Namespace, kind: str, sparse: bool, stage: int, found: list[dict[str, Any]]) -> dict[str, Any]:
    """What a stage took, over all rounds; peaks are of the process that had the highest."""
    clocks = [each["clock"] for each in found]
    times = Times.of([value for clock in clocks for value in clock.samples_ms(stage)])
    tokens = args.batch * args.length * num_processes()
    tokens_per_s = 1e3 * tokens / times.median_ms
    peak_flops = next((value for name, value in PEAK_FLOPS.items() if name in _gpu_name()), None)
    needed = training_flops(shape_config(args.shape, args.layers), kind, args.length, args.teacher)
    flops = tokens_per_s * needed / num_processes()
    return {
        "training": kind,
        "model": _name(sparse),
        "stage": stage,
        **asdict(times),
        "samples": sum(len(clock.samples_ms(stage)) for clock in clocks),
        "tokens_per_step": tokens,
        "tokens_per_s": tokens_per_s,
        "model_flops_per_s_per_gpu": flops,
        "model_flops_utilisation": None if peak_flops is None else flops / peak_flops,
        "peak_memory_bytes": _highest(max((clock.peak_bytes(stage) or 0) for clock in clocks)),
        "first_peak_memory_bytes": _highest(max((clock.first_peak_bytes() or 0) for clock in clocks)),
        "estimated_memory_bytes": found[-1]["estimate"],
        "sparsity": found[-1]["sparsity"].get(stage),
        **(found[-1]["profiles"][stage - 1] if args.profiled_steps else {}),
    }


def _name(sparse: bool) -> str:
    return "lte" if sparse else "dense"


def _gpu_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def _highest(peak: int) -> int | None:
    """The highest of all processes; `None` where there is no GPU."""
    peaks: list[Any] = [peak]
    if dist.is_initialized():
        peaks = [None] * dist.get_world_size()
        dist.all_gather_object(peaks, peak)
    return max(peaks) or None


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows for reading."""
    lines = []
    for each in rows:
        name = f"{each['training']:>6} {each['model']:>6}"
        if "note" in each:
            lines.append(f"{name}  {each['note'][:100]}")
            continue
        use, peak, speed = each["model_flops_utilisation"], each["peak_memory_bytes"], each["speed_over_dense"]
        lines.append(
            f"{name} stage {each['stage']}  {each['median_ms']:8.1f} ms ({each['p20_ms']:.1f}-{each['p80_ms']:.1f})  "
            f"{each['tokens_per_s']:8.0f} tokens/s"
            + (f"  x{speed:.3f} speed" if speed else "")
            + (f"  MFU {use:.1%}" if use else "")
            + (f"  {peak / 1e9:.1f} GB" if peak else "")
            + (f" x{each['memory_over_dense']:.3f}" if each["memory_over_dense"] else "")
        )
    return lines


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama2-7b")
    parser.add_argument("--layers", type=int, help="the first so many layers; unset: all")
    parser.add_argument("--kinds", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--batch", type=int, default=4, help="rows of each process and pass")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=12, help="of each stage")
    parser.add_argument("--warm-up", type=int, default=3, help="steps of each stage that are not counted")
    parser.add_argument("--profiled-steps", type=int, default=0, help="steps of each stage that a profiler watches")
    parser.add_argument("--rounds", type=int, default=1, help="how often each training runs, in turns")
    parser.add_argument("--teacher", action="store_true", help="distil from the dense model in bf16")
    parser.add_argument("--optim", choices=get_args(Optim), default="adamw_bnb_8bit")
    parser.add_argument("--weights-dtype", choices=("bfloat16", "float32"), default="bfloat16",
                        help="float32: with autocast in bf16")  # fmt: skip
    parser.add_argument("--tf32", action=argparse.BooleanOptionalAction, default=True,
                        help="TensorFloat-32 products of the fp32 routers, as lte train has in bf16")  # fmt: skip
    parser.add_argument("--lora-rank", type=int, default=64)
    parser.add_argument("--expert-size", type=int, default=32)
    parser.add_argument("--target-sparsity", type=float, default=0.5)
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compile", action="store_true", help="compile layers and loss, but of qlora")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(arguments)
    counted = args.steps - max(1, args.profiled_steps) - args.warm_up
    if counted < 1 or args.warm_up < 0 or args.profiled_steps < 0:
        parser.error(
            f"--warm-up must leave two of the steps, one of them profiled if any is, got --warm-up {args.warm_up} of "
            f"{args.steps} and --profiled-steps {args.profiled_steps}"
        )
    needed = {"lora": ["peft"], "qlora": ["peft", "bitsandbytes"]}
    missing = {name for kind in args.kinds for name in needed.get(kind, []) if find_spec(name) is None}
    if missing:
        parser.error(f"--kinds {' '.join(args.kinds)} needs {' and '.join(sorted(missing))}: pip install them")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    optimiser_arguments(make_config(args, "full", "dense"), torch.cuda.is_available())
    if torch.cuda.is_available():
        torch.cuda.set_device(training_device())
    rows: list[dict[str, Any]] = []
    for kind in args.kinds:
        found = measure(args, kind)
        rows += found
        if is_main_process():
            print("\n".join(table(found)), flush=True)
            if args.output:
                write(args, rows)
    if dist.is_initialized():
        dist.destroy_process_group()


def write(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """All rows until now with their settings and where they were measured, so that a run that is cut keeps some."""
    config = {key: value for key, value in vars(args).items() if key != "output"}
    plain = {"benchmark": "training_speed", "config": config, "processes": num_processes()}
    write_json_atomic(args.output, {**plain, "rows": rows, **environment()})


if __name__ == "__main__":
    main()
