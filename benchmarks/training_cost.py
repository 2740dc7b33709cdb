"""What training with LTE costs by the size of the model: memory, disk and hours, for docs/scaling.md.

Memory and disk are what `lte train` says at its start, from the shapes of the model alone. Hours are the FLOPs of the
dense training over what a GPU did of its peak in the measured training (benchmarks/training_speed.py) of the same kind
that is nearest in size; without one there are no hours. Where the very shape and kind of training was measured, memory
and hours are those of the run.

    python benchmarks/training_cost.py --page docs/scaling.md
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from training_speed import KINDS, PEAK_FLOPS, make_config, parse, training_flops
from transformers import AutoModelForCausalLM

import lte
from lte.bench.shapes import shape_config
from lte.hf.families import family_of
from lte.hf.install import install_sparse_ffns_
from lte.records import read_json
from lte.train.disk_space import RunFiles
from lte.train.memory import MemoryEstimate, estimate_memory

SIZES = {"1.5B": "qwen2.5-1.5b", "7B": "llama2-7b", "13B": "llama2-13b", "70B": "llama2-70b"}
NAMES = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}
BEGIN, END = "<!-- benchmarks/training_cost.py writes from here -->", "<!-- to here -->"
# Flags of benchmarks/training_speed.py that decide what a training costs.
TRAINING = (
    *("shape", "layers", "length", "batch", "teacher", "optim", "weights_dtype", "lora_rank", "checkpointing"),
    *("compile", "expert_size", "tf32"),
)
TOKENS, LENGTH, BATCH = 1e8, 2048, 4
# Bytes of a GPU that a training may take, with room for CUDA and for what is split badly.
USABLE = 72e9
MARK = r"\*"


def sparse_model(shape: str) -> Any:
    """An LTE model without weights."""
    config = shape_config(shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        install_sparse_ffns_(model, family_of(config), lte.LteConfig(expert_size=32))
    return model


def estimates(shape: str, kind: str) -> tuple[MemoryEstimate, RunFiles]:
    """Memory and disk of a training of the kind."""
    flags = ["--shape", shape, "--kinds", kind, "--batch", str(BATCH), "--length", str(LENGTH)]
    config, model = make_config(parse(flags), kind, "straight_through"), sparse_model(shape)
    return estimate_memory(model, config, LENGTH), RunFiles.of(model, config)


def gpus(memory: MemoryEstimate, shape: str) -> int:
    """How many GPUs of 80 GB it takes; with more than one, weights, gradients and moments are in shards (FSDP2).

    Each GPU then has one block whole, and its logits at once: in bf16, their logarithms and a gradient in fp32.
    """
    if memory.total <= USABLE:
        return 1
    config = shape_config(shape)
    split = memory.weights + memory.gradients + memory.moments
    whole = memory.weights / config.num_hidden_layers + memory.activations
    whole += BATCH * LENGTH * config.vocab_size * 14
    return next(2**power for power in range(1, 12) if split / 2**power + whole <= USABLE)


def measured_rows(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Rows of LTE on one GPU, each with the name and the settings of its file."""
    found = []
    for path in files:
        content = read_json(path)
        if content["processes"] == 1:
            rows = [row for row in content["rows"] if row["model"] == "lte" and "note" not in row]
            found += [{**row, "config": content["config"], "file": path.name} for row in rows]
    return found


def of_run(rows: Sequence[dict[str, Any]], shape: str, kind: str) -> list[dict[str, Any]]:
    """The rows of just this training: both stages, with the settings of the table."""
    return [row for row in rows if row["training"] == kind and not _other_settings(row, shape)]


def _other_settings(row: dict[str, Any], shape: str) -> int:
    """How many settings a measured training has otherwise than that of the table."""
    wanted = vars(parse(["--shape", shape, "--batch", str(BATCH), "--length", str(LENGTH)]))
    return sum(row["config"].get(key) != wanted[key] for key in TRAINING)


def nearest(rows: Sequence[dict[str, Any]], shape: str, kind: str) -> list[dict[str, Any]]:
    """The rows with a share of the peak, of both stages, of the training of the kind whose model is nearest in size.

    Size is FLOPs for each token, and near a small ratio. Of equals the one whose other settings are nearest counts.
    """
    known = [row for row in rows if row["training"] == kind and row["model_flops_utilisation"]]
    size = training_flops(shape_config(shape), "full", LENGTH)

    def distance(row: dict[str, Any]) -> tuple[float, int, str]:
        other = training_flops(shape_config(row["config"]["shape"], row["config"]["layers"]), "full", LENGTH)
        return abs(math.log(other / size)), _other_settings(row, shape), row["file"]

    first = min(map(distance, known), default=None)
    return [row for row in known if distance(row) == first]


def hours(
    shape: str, kind: str, measured: Sequence[dict[str, Any]], near: Sequence[dict[str, Any]], tokens: float
) -> float | None:
    """Hours of one H200 for so many tokens, half of them in each stage; `None` where nothing like it was measured.

    Args:
        shape: of the model.
        kind: of the training.
        measured: rows of this very training, if there are any.
        near: rows of another one, by whose share of the peak it goes.
        tokens: of both stages.
    """
    if measured:
        return tokens * statistics.fmean(1 / row["tokens_per_s"] for row in measured) / 3600
    if not near:
        return None
    rate = utilisation(near) * PEAK_FLOPS["H200"] / training_flops(shape_config(shape), kind, LENGTH)
    return tokens / rate / 3600


def utilisation(rows: Sequence[dict[str, Any]]) -> float:
    """The share of the peak over both stages, which have equally many tokens."""
    return statistics.harmonic_mean([row["model_flops_utilisation"] for row in rows])


def table(measured: Sequence[dict[str, Any]]) -> list[str]:
    """The lines of the table, and what they rest on."""
    heads = ["size", "training", "GPU memory, GB", "GPUs of 80 GB", "folder, GB", "disk in training, GB", "hours"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    rests: dict[str, list[str]] = {}
    for size, shape in SIZES.items():
        for kind in KINDS:
            memory, files = estimates(shape, kind)
            own, near = of_run(measured, shape, kind), nearest(measured, shape, kind)
            took = hours(shape, kind, own, near, TOKENS)
            rests.setdefault(_source(own, near), []).append(f"{size} {NAMES[kind]}")
            peaks = [row["peak_memory_bytes"] for row in own if row["peak_memory_bytes"]]
            cells = [
                *(size, NAMES[kind]),
                _number(max(peaks) / 1e9) + MARK if peaks else _number(memory.total / 1e9),
                *(str(gpus(memory, shape)), _number(files.model / 1e9), _number(files.most / 1e9)),
                "not measured" if took is None else _number(took) + (MARK if own else ""),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    stars = "Numbers with a star are measured, all others arithmetic" if measured else "All of it is arithmetic"
    lines += ["", f"{stars}."]
    for source, trainings in rests.items():
        lines += ["", f"{source}: {', '.join(trainings) if len(rests) > 1 else 'all'}."]
    return lines


def _source(own: Sequence[dict[str, Any]], near: Sequence[dict[str, Any]]) -> str:
    """What the hours of a training rest on."""
    if own:
        return "Hours that were measured"
    if not near:
        return "Without hours, since no training of the kind was measured"
    config, file = near[0]["config"], near[0]["file"]
    layers = f" of {config['layers']} layers" if config["layers"] else ""
    share = f"{utilisation(near):.0%} of the peak in bf16"
    return f"Hours by the share that {config['shape']}{layers}, {NAMES[near[0]['training']]}, had ({share}, `{file}`)"


def _number(value: float) -> str:
    """Two digits."""
    digits = max(0, 1 - math.floor(math.log10(value))) if value else 0
    return f"{round(value, 1 - math.floor(math.log10(value))) if value else 0:.{digits}f}"


def write_page(page: Path, lines: Sequence[str]) -> None:
    """Puts the lines between the marks of a page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text("\n".join([f"{before}{BEGIN}", *lines, f"{END}{after}"]), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted((Path(__file__).parents[1] / "results").glob("training_speed*.json"))
    parser.add_argument("--measured", type=Path, nargs="*", default=known, help="unset: results/training_speed*.json")
    parser.add_argument("--page", type=Path, help="whose table is written anew")
    args = parser.parse_args(arguments)
    lines = table(measured_rows(args.measured))
    print("\n".join(lines))
    if args.page:
        write_page(args.page, lines)


if __name__ == "__main__":
    main()
