"""SmolLM2-135M continued on Wikipedia and books: dense, static pruning, and LTE, all with one schedule.

    python experiments/wikipedia/run.py --config experiments/wikipedia/main.yaml --cache CACHE --model MODEL.gguf \
        --output results/wikipedia

Reads a list of runs, does each one that has no result file yet, and writes one JSON object per run. Every number is
measured on the folder that the run saved and loaded again. A run with `keep: true` keeps its model, with the
tokenizer, for the runs that name it as their start or teacher and for `lte eval` and `lte bench`; it is done again when
that model is gone. Several processes with the same arguments, one per GPU (CUDA_VISIBLE_DEVICES), share the runs.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, logging

import lte
from lte.config import CALIBRATED_GROUPINGS
from lte.eval.flops import bytes_per_token, flops_per_token
from lte.eval.models import measurement_summary
from lte.eval.perplexity import evaluate_model
from lte.hf.dense import load_dense_model, load_tokenizer
from lte.methods.static_pruning import StaticPruningConfig, prune_static_
from lte.records import result_record, write_record
from lte.train.config import TrainConfig
from lte.train.two_stage import train_two_stage

TRAIN_FILES = ("wikipedia_train", "books")  # a run's `data`, if it names none
TEST_FILES = ("wikipedia_valid", "wikitext2_test")
LENGTH = 1024
NEURONS = 1536  # per layer of the dense SmolLM2-135M


class PackedTokens(torch.utils.data.Dataset):
    """Documents in a seeded order, one after the other, cut into rows of `LENGTH` tokens.

    A file that is named twice counts twice.
    """

    def __init__(self, cache: Path, names: Sequence[str], seed: int | None):
        documents = []
        for name in names:
            tokens = np.load(cache / f"{name}.npy")
            documents += np.split(tokens, np.cumsum(np.load(cache / f"{name}_lengths.npy"))[:-1])
        # Books are cut into article-sized pieces, or a row order would hold one book for thousands of rows.
        pieces = [doc[i : i + 4 * LENGTH] for doc in documents for i in range(0, len(doc), 4 * LENGTH)]
        if seed is not None:
            pieces = [pieces[i] for i in np.random.default_rng(seed).permutation(len(pieces))]
        tokens = np.concatenate(pieces)
        self.rows = tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, LENGTH)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.rows[index].astype(np.int64))
        return {"input_ids": ids, "labels": ids.clone()}


def batches(dataset: PackedTokens, size: int, device: torch.device, limit: int | None = None) -> list[dict[str, Any]]:
    """The rows of a dataset in order, stacked to batches of `size` rows."""
    count = min(len(dataset), limit or len(dataset))
    stacked = []
    for start in range(0, count, size):
        ids = torch.stack([dataset[i]["input_ids"] for i in range(start, min(start + size, count))]).to(device)
        stacked.append({"input_ids": ids, "labels": ids})
    return stacked


def build(run: dict[str, Any], args: argparse.Namespace, train: PackedTokens, device: torch.device) -> Any:
    """The model that a run trains: dense and static models are wrapped too, so that one code path trains all."""
    start = args.work / run["start"] if run.get("start") else args.model
    while run.get("start") and not (start / "config.json").exists():
        time.sleep(1)  # another process trains it
    model = load_dense_model(start).to(device)
    target = run.get("target_sparsity", 0.0)
    if run["method"] == "static":
        config = StaticPruningConfig(target_sparsity=target)
        model = prune_static_(model, config, batches(train, 8, device, 64))
    lte_fields = {f.name for f in fields(lte.LteConfig)}
    options = {key: value for key, value in run.items() if key in lte_fields and key != "target_sparsity"}
    if run["method"] != "lte":
        options, target = {"grouping": "contiguous"}, 0.0
    calibration = batches(train, 8, device, 64) if options.get("grouping") in CALIBRATED_GROUPINGS else None
    return lte.sparsify_(model, lte.LteConfig(target_sparsity=target, **options), calibration=calibration)


def train_and_save(
    run: dict[str, Any], args: argparse.Namespace, train: PackedTokens, folder: Path
) -> tuple[Any, TrainConfig]:
    """Trains one run and saves it to `folder`; dense and static models are saved as the stock models they are."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(run, args, train, device)
    train_fields = {f.name for f in fields(TrainConfig)}
    options = {key: value for key, value in run.items() if key in train_fields}
    steps = max(2, math.ceil(run["tokens"] / (options["batch_size"] * LENGTH)))
    first = round(run.get("stage1_ratio", 0.5) * steps)
    if run["method"] != "lte":
        options["recipe"] = "dense"
    config = TrainConfig(**options, stage1_steps=first, stage2_steps=steps - first)
    teacher = None
    if config.distillation_weight:
        teacher = AutoModelForCausalLM.from_pretrained(args.work / run["teacher"], dtype=torch.bfloat16)
    stages = folder.with_name(f"{folder.name}.stages")
    # The thresholds are set on training articles alone, since the sparsity is stated on held-out articles.
    articles = PackedTokens(args.cache, ("wikipedia_train",), run["seed"])
    summary = train_two_stage(model, train, config, stages, teacher=teacher, calibration_dataset=articles)
    shutil.rmtree(stages)
    if run["method"] != "lte":
        lte.densify_(model)
    if run.get("keep"):
        load_tokenizer(args.model).save_pretrained(folder)  # before config.json, for which other processes wait
    model.save_pretrained(folder)
    return summary, config


def evaluate(folder: Path, cache: Path) -> tuple[Any, dict[str, Any]]:
    """Perplexity and sparsity of a saved folder on every test text."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    return model, {
        name: evaluate_model(model, batches(PackedTokens(cache, (name,), None), 16, device), progress=False)
        for name in TEST_FILES
    }


def remember_measurement(folder: Path, measurement: Any, hashes: dict[str, str]) -> None:
    """Notes the sparsity on held-out articles in a saved folder's config: the kernels choose their paths by it."""
    config = AutoConfig.from_pretrained(folder)
    held_out = {"sha256": hashes["wikipedia/valid.jsonl.xz"]}
    config.lte_measurement = measurement_summary(
        measurement, {"train_source": "wikipedia/valid.jsonl.xz", "validation": held_out}
    )
    config.save_pretrained(folder)


def do_run(run: dict[str, Any], args: argparse.Namespace, hashes: dict[str, str]) -> None:
    """One run from the dense checkpoint to its result files."""
    torch.cuda.empty_cache()
    name = run["name"]
    folder = args.work / name
    start = time.monotonic()
    train = PackedTokens(args.cache, run.get("data", TRAIN_FILES), run["seed"])
    summary, config = train_and_save(run, args, train, folder)
    model, scores = evaluate(folder, args.cache)
    records = []
    for split, (perplexity, measurement) in scores.items():
        sparsity = 0.0 if measurement is None else measurement.sparsity
        records.append(
            result_record(
                task="wikipedia",
                model="SmolLM2-135M-Instruct (Q4_1 GGUF)",
                method=run["method"],
                seed=run["seed"],
                target_sparsity=run.get("target_sparsity", 0.0),
                sparsity=1 - model.config.intermediate_size / NEURONS if measurement is None else sparsity,
                metric="perplexity",
                value=perplexity.perplexity,
                split=split,
                flops_per_token=flops_per_token(model, sparsity),
                bytes_per_token=bytes_per_token(model, sparsity),
                tokens_trained=summary.tokens_trained,
                wall_time_s=summary.wall_time_s,
                config={
                    "run": run,
                    "train": config.to_dict(),
                    "sequence_length": LENGTH,
                    "data_sha256": hashes,
                },
                measurement=None if measurement is None else measurement.to_dict(),
                log=summary.log_history if split == TEST_FILES[0] else None,
            )
        )
        print(
            f"{name}: {split} perplexity {perplexity.perplexity:.3f} sparsity {records[-1]['sparsity']:.4f} "
            f"({summary.tokens_trained / summary.wall_time_s:.0f} tokens/s, {time.monotonic() - start:.0f} s)",
            flush=True,
        )
    measurement = scores[TEST_FILES[0]][1]
    if run.get("keep") and measurement is not None:
        remember_measurement(folder, measurement, hashes)
    for split, record in zip(scores, records, strict=True):
        write_record(args.output / f"{name}-{split}.json", record)
    if not run.get("keep"):
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="YAML: `defaults` and a list of `runs`")
    parser.add_argument("--cache", type=Path, required=True, help="folder that prepare.py wrote")
    parser.add_argument("--model", required=True, help="dense model: hub name, folder, or GGUF file")
    parser.add_argument("--work", type=Path, default=Path("runs"), help="folder for models and checkpoints")
    parser.add_argument("--output", type=Path, required=True, help="folder for the result files")
    parser.add_argument("--only", nargs="*", help="names of the runs to do; default: all")
    args = parser.parse_args()
    logging.set_verbosity_error()
    torch._dynamo.config.recompile_limit = 64  # one process trains many models
    torch.set_float32_matmul_precision("high")
    spec = yaml.safe_load(args.config.read_text())
    hashes = json.loads((args.cache / "sha256.json").read_text())
    args.output.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    for entry in spec["runs"]:
        run = {**spec["defaults"], **entry}
        if args.only and run["name"] not in args.only:
            continue
        with (args.work / f"{run['name']}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # another process does it
            done = (args.output / f"{run['name']}-{TEST_FILES[-1]}.json").exists()
            if not done or (run.get("keep") and not (args.work / run["name"] / "config.json").exists()):
                do_run(run, args, hashes)


if __name__ == "__main__":
    main()
