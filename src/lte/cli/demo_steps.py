"""The steps of `lte demo`, the whole way on a CPU."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from torch import Tensor

from lte.bench.timing import Times
from lte.cli.command import EXIT_ERROR, after_saving
from lte.cli.generate import describe_use, encode_prompt, generate_ids
from lte.config import GFLOP, LteConfig
from lte.data.config import DataConfig
from lte.eval.kernels import use_kernels_
from lte.eval.models import load_config, max_positions, save_folder, task_record
from lte.eval.speed import SECONDS, TokenClock, interleaved_token_s
from lte.hf.dense import load_tokenizer
from lte.hf.install import sparse_ffns
from lte.hf.stepping import has_engine
from lte.methods import densify_
from lte.records import ResultRecord
from lte.report.demo_report import write_demo_report
from lte.runs.measure import measure_folder
from lte.runs.memory import peak_memory_bytes
from lte.runs.pipeline import ModelSettings, Watcher, make_model
from lte.runs.workload import TextWorkload
from lte.train.config import TrainConfig
from lte.train.objective import language_terms
from lte.train.processes import training_device
from lte.train.router_init import calibrate_thresholds_, fit_routers_
from lte.train.summary import TrainingSummary
from lte.train.two_stage import device_batches

# 1024 tokens a step: more would not fit the memory, and not be faster on a CPU.
BATCH_SIZE, SEQUENCE_LENGTH, HELD_OUT_TOKENS = 4, 256, 8192
FIT_TOKENS, CALIBRATION_TOKENS = 8192, 8192
GENERATED_TOKENS, TIMED_TOKENS = 40, 24


# 30 to 100 steps are too few for routers that ramp up from zero sparsity. They start at the target, fitted.
RECIPE = {
    "recipe": "straight_through",
    "stage2_routers": "frozen",
    "router_fit_tokens": 0,
    "ramp_ratio": 0.01,
    "learning_rate": 2e-4,
    "trainable": "ffn",
    "distillation_weight": 1.0,
    "calibration_tokens": CALIBRATION_TOKENS,
    "batch_size": BATCH_SIZE,
    "bf16": True,
    "save_steps": 1_000_000,
}
# Fewer would teach the routers nothing; a machine this slow overruns its minutes, and is told so.
MIN_STEPS = 10
# Trainer, optimiser, and the sparse FFNs' router losses on top of what `time_step` times.
OVERHEAD = 1.1
STAGE1_SHARE = 0.5
PROMPT = "In Python, the with statement is used to"
EXPLANATION = (
    "A language model runs all neurons of its feed-forward layers (FFNs) for every token. Here a small model learns to "
    "skip some of them: its neurons are grouped into experts, a router in every layer decides for every token which "
    "experts run, and training adapts the model to that. The original model is the teacher: the sparse model learns "
    "to predict what the original predicts."
)


@dataclass(frozen=True)
class Budget:
    """A number of minutes from the start of the demo.

    Attributes:
        minutes: in all.
        start: `time.monotonic()` when the demo began.
        imports_s: seconds that the imports took before that.
    """

    minutes: float
    start: float
    imports_s: float = 0.5

    def elapsed_s(self) -> float:
        """Seconds since the command was entered."""
        return time.monotonic() - self.start + self.imports_s

    def steps(self, step_s: float, rest_s: float, max_steps: int) -> tuple[int, int]:
        """Optimiser steps of stage 1 and 2 that fit, when `rest_s` seconds are needed after them.

        Args:
            step_s: seconds of one forward and backward pass.
            rest_s: seconds of everything after training.
            max_steps: of both stages together.
        """
        left = 60 * self.minutes - self.elapsed_s() - rest_s
        total = min(max_steps, max(MIN_STEPS, int(left / (OVERHEAD * step_s))))
        first = max(1, round(STAGE1_SHARE * total))
        return first, max(1, total - first)


def time_step(model: Any, teacher: Any, batch: dict[str, Tensor]) -> float:
    """Seconds of one forward and backward pass with its teacher; nothing is changed."""

    def step() -> None:
        with torch.autocast(model.device.type, torch.bfloat16):
            with torch.no_grad():
                target = teacher(input_ids=batch["input_ids"], use_cache=False).logits
            logits = model(input_ids=batch["input_ids"], use_cache=False).logits
            loss = language_terms(logits, batch["labels"], target)[1]
        loss.backward()

    step()  # the first one sets up threads and memory
    seconds = timed(step)
    model.zero_grad(set_to_none=True)
    return seconds


def timed(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.monotonic()
    call()
    return time.monotonic() - start


@dataclass
class Demo(Watcher):
    """One run of the demo; `execute` does all steps.

    Attributes:
        console: where the narrative goes.
        budget: how long everything may take.
        model: dense model to start from.
        output: folder for the model and the report.
        target_sparsity: share of FFN neurons to skip.
        max_steps: training steps at most.
        seed: of grouping, data order and training.
        records: result records by name, filled on the way.
        samples: generated texts by name, filled on the way.
        facts: what the report says of the run, filled on the way.
    """

    console: Console
    budget: Budget
    model: str
    output: Path
    target_sparsity: float
    max_steps: int
    seed: int
    records: dict[str, ResultRecord] = field(default_factory=dict)
    samples: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def execute(self) -> None:
        """Converts, trains, measures, saves, verifies and reports."""
        self.console.print(Panel(EXPLANATION, title="lte demo"))
        self.say("1/6 Load the dense model and the text")
        length = min(SEQUENCE_LENGTH, max_positions(SimpleNamespace(config=load_config(self.model))) or SEQUENCE_LENGTH)
        data = DataConfig(
            sequence_length=length, validation_fraction=0.1, max_validation_tokens=HELD_OUT_TOKENS, data_seed=self.seed
        )
        self.tokenizer = load_tokenizer(self.model)
        self.work = TextWorkload(data, self.tokenizer, BATCH_SIZE)
        settings = ModelSettings(
            start=self.model,
            config=LteConfig(target_sparsity=self.target_sparsity, seed=self.seed),
            train=TrainConfig(seed=self.seed, **RECIPE),  # type: ignore[arg-type]
            teacher=self.model,
        )
        folder = self.output / "training"
        shutil.rmtree(folder, ignore_errors=True)
        trained, summary = make_model(settings, self.work, folder, watcher=self)
        self.facts["tokens"] = summary.tokens_trained
        self.say("4/6 Save and measure")
        save_folder(trained, self.tokenizer, self.output)
        shutil.rmtree(folder, ignore_errors=True)
        what, again = "measuring and reporting it", f"lte eval {shlex.quote(str(self.output))}"
        if not after_saving(
            f"the model is saved in {self.output}", what, again, lambda: self.after_training(trained, summary)
        ):
            raise typer.Exit(EXIT_ERROR)

    def after_training(self, trained: Any, summary: TrainingSummary) -> bool:
        """Measures and verifies the saved folder, and reports; returns that it did."""
        fields = self._fields(tokens_trained=summary.tokens_trained, wall_time_s=summary.wall_time_s)
        with torch.autocast(training_device().type, torch.bfloat16):
            found = measure_folder(self.output, self.work, kernels="off", **fields)
        self._tell("sparse", found.record)
        self.say("5/6 Compare the folder with the model")
        self.check(trained, found.model)
        self.samples["sparse"] = self.write(found.model)
        self.time(found.model, densify_(trained))
        self.say("6/6 Report")
        self.report(summary, found.result.measurement)
        return True

    def loaded(self, model: Any) -> None:
        """Measures the dense model."""
        if sparse_ffns(model):
            raise ValueError(f"model must be dense for the demo, got the LTE model {self.model}")
        info = self.work.info
        self.console.print(
            f"Text: Python's help topics, {info['train']['tokens']} tokens to train on, "
            f"{info['validation']['tokens']} of other documents held out.",
            highlight=False,
        )
        self.eval_s = timed(lambda: self.evaluate(model, "dense"))
        self.samples["dense"] = self.write(model)
        self.say("2/6 Group the FFN neurons into experts, give every layer a router")

    def before_training(self, model: Any, teacher: Any, train: TrainConfig) -> TrainConfig:
        """Fits the routers and sets the thresholds to the target; trains as many steps as the time allows."""
        ffn = next(iter(sparse_ffns(model).values()))
        self.console.print(
            f"{len(sparse_ffns(model))} layers, each with {ffn.num_experts} experts of "
            f"{ffn.num_neurons // ffn.num_experts} neurons. Routers start from a fit to the experts' norms.",
            highlight=False,
        )
        rows, collator = self.work.train, self.work.collator
        with torch.autocast(training_device().type, torch.bfloat16):
            fit_routers_(model, device_batches(model, rows, FIT_TOKENS, BATCH_SIZE, collator))
            batches = device_batches(model, rows, FIT_TOKENS // 2, BATCH_SIZE, collator)
            calibrate_thresholds_(model, batches, self.target_sparsity, rounds=2)
        self.evaluate(model, "sparse, untrained")
        self.say("3/6 Train: stage 1 (model and routers), stage 2 (adaptation)")
        batch = {
            name: value.to(training_device()) for name, value in collator([rows[i] for i in range(BATCH_SIZE)]).items()
        }
        step_s = time_step(model, teacher, batch)
        # After training: up to 4 rounds of calibration, 2 evaluations, writing, timing, saving, pictures.
        steps = self.budget.steps(step_s, 6 * self.eval_s + SECONDS + 25, self.max_steps)
        self.facts |= {"steps": steps, "step_s": step_s, "max_steps": self.max_steps}
        self.console.print(f"One step takes {step_s:.1f} s here: {steps[0]} + {steps[1]} steps.", highlight=False)
        return replace(train, stage1_steps=steps[0], stage2_steps=steps[1], logging_steps=max(1, sum(steps) // 24))

    def say(self, text: str) -> None:
        """Prints the heading of a step with the time so far."""
        self.console.print(f"\n[bold]{text}[/bold] [dim]({self.budget.elapsed_s():.0f} s)[/dim]", highlight=False)

    def evaluate(self, model: Any, name: str) -> None:
        """Records and prints the perplexity of a model on the held-out text before it is trained."""
        start = time.monotonic()
        with torch.autocast(training_device().type, torch.bfloat16):
            result = self.work.measure(model)
        fields = self._fields(tokens_trained=0, wall_time_s=time.monotonic() - start)
        self._tell(name, task_record(model, result, task=self.work.name, **fields))

    def _fields(self, **fields: Any) -> dict[str, Any]:
        config = {"recipe": RECIPE, **self.work.settings, "data_info": self.work.info, **self.facts}
        return {"model": Path(self.model).name, "seed": self.seed, "config": config, **fields}

    def _tell(self, name: str, record: ResultRecord) -> None:
        self.records[name] = record
        skipped = "" if record["method"] == "dense" else f", {100 * record['sparsity']:.1f}% of FFN neurons skipped"
        self.console.print(f"{name}: perplexity {record['value']:.2f}{skipped}.", highlight=False)

    def write(self, model: Any) -> str:
        """What a model makes of the prompt, greedily."""
        ids = encode_prompt(self.tokenizer, PROMPT, chat=False).to(model.device)
        output = generate_ids(model, self.tokenizer, ids, GENERATED_TOKENS)
        text = str(self.tokenizer.decode(output[0], skip_special_tokens=True))
        self.console.print(f"It writes: [italic]{escape(text)}[/italic]", highlight=False)
        self.console.print(describe_use(model, output), style="dim", highlight=False)
        return text

    def check(self, model: Any, loaded: Any) -> None:
        """Verifies that the folder holds what was trained.

        Raises:
            RuntimeError: if it computes anything else.
        """
        ids = self.work.collator([self.work.train[i] for i in range(BATCH_SIZE)])["input_ids"].to(training_device())
        model.to(training_device()).eval()
        with torch.no_grad():
            equal = torch.equal(model(input_ids=ids).logits, loaded(input_ids=ids).logits)
        if not equal:
            raise RuntimeError(f"the folder {self.output} computes something else than the model that was saved")
        self.facts["checks"] = [
            "the saved folder, loaded again, gives bit-equal logits",
            "all numbers are measured on it",
        ]
        self.console.print(f"{'; '.join(self.facts['checks']).capitalize()}.", highlight=False)

    def time(self, sparse: Any, dense: Any) -> None:
        """Times both models as `generate` runs them, in turn, and puts it into the sparse model's record.

        Args:
            sparse: becomes accelerated.
            dense: a stock model, which runs in plain transformers with the faster one of its two kinds of caches.
        """
        use_kernels_(sparse, tell=False)
        ids = encode_prompt(self.tokenizer, PROMPT, chat=False).to(sparse.device)

        def run(model: Any, clock: TokenClock, **settings: Any) -> None:
            count = {"max_new_tokens": TIMED_TOKENS, "min_new_tokens": TIMED_TOKENS}
            generate_ids(model, self.tokenizer, ids, streamer=clock, **count, **settings)

        samples = interleaved_token_s(
            {
                "sparse": partial(run, sparse),
                "dynamic": partial(run, dense),
                "static": partial(run, dense, cache_implementation="static"),
            }
        )
        times = {name: Times.of([1e3 * seconds for seconds in found]) for name, found in samples.items()}
        cache = min("dynamic", "static", key=lambda name: times[name].median_ms)
        found, other = times["sparse"], times[cache]
        how = "whole decoding steps" if has_engine(sparse) else "module by module"
        self.records["sparse"] = self.records["sparse"].with_fields(
            latency_ms=found.median_ms,
            latency_p20_ms=found.p20_ms,
            latency_p80_ms=found.p80_ms,
            latency_dense_ms=other.median_ms,
            latency_note=f"a token of generate, batch 1, {sparse.dtype}, {how}; dense: transformers, {cache} cache",
        )
        self.facts["speed"] = (
            f"generate on this machine: {1e3 / found.median_ms:.1f} tokens per second sparse ({how}), "
            f"{1e3 / other.median_ms:.1f} dense (plain transformers, {cache} cache): a token takes "
            f"{found.median_ms / other.median_ms:.2f} of the dense time"
        )
        self.console.print(f"{self.facts['speed']}.", highlight=False)

    def report(self, summary: TrainingSummary, measurement: Any) -> None:
        """Writes the report and prints its numbers."""
        self.facts |= {"total_s": self.budget.elapsed_s(), "peak_gb": peak_memory_bytes() / 1e9}
        path = write_demo_report(
            self.output,
            self.records,
            measurement,
            summary.log_history,
            samples=self.samples,
            notes=report_notes(self.records, self.facts),
        )
        self.console.print(result_table(self.records))
        self.console.print(
            f"Target sparsity {100 * self.target_sparsity:g}%, measured {100 * measurement.sparsity:.2f}%. "
            f"{self.facts['total_s'] / 60:.1f} minutes, {self.facts['peak_gb']:.1f} GB. Report: {path}\n"
            f"Speed of {self.facts['speed']}.\n"
            f"Try: lte report {self.output} --html report.html; lte inspect {self.output}; "
            f"lte generate {self.output} --prompt 'A list is'",
            highlight=False,
            soft_wrap=True,
        )


def result_table(records: Mapping[str, ResultRecord]) -> Table:
    """The records of all models, one per row."""
    table = Table(title="Held-out text", title_justify="left")
    for heading in ("model", "perplexity", "FFN sparsity", "GFLOPs per token"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name, record in records.items():
        sparsity = f"{100 * record['sparsity']:.2f}%"
        gflops = f"{record['flops_per_token'] / GFLOP:.4f}"
        table.add_row(name, f"{record['value']:.2f}", sparsity, gflops)
    return table


def report_notes(records: Mapping[str, ResultRecord], facts: Mapping[str, Any]) -> list[str]:
    """The paragraphs of the report.

    Args:
        records: result records by name.
        facts: steps, tokens, step_s, max_steps, checks, speed, total_s, peak_gb of the run.
    """
    sparse = records["sparse"]
    measured, target = sparse["sparsity"], sparse["target_sparsity"]
    tokens = sparse["tokens_evaluated"]
    first, second = facts["steps"]
    cut = "" if first + second >= facts["max_steps"] else " This machine was too slow for all of them in its minutes."
    return [
        f"Target sparsity {100 * target:g}%, measured {100 * measured:.2f}% in hard mode on {tokens} held-out tokens "
        "of documents that were not trained on. All perplexities are of that text, computed in bfloat16.",
        "*dense* is the original model. *sparse, untrained* has routers fitted to the experts' norms and thresholds "
        "set to the target, and no training. *sparse* was then trained to predict what the original predicts "
        "(distillation alone), so the original is the fair comparison: it has nothing to learn from this training, "
        "whose loss it starts at zero.",
        f"Training: {first} steps of stage 1 and {second} of stage 2, {facts['tokens']} tokens in all, chosen from a "
        f"measured {facts['step_s']:.1f} s per step and at most {facts['max_steps']} on any machine.{cut}",
        f"Checks: {'; '.join(facts['checks'])}.",
        f"Speed of {facts['speed']}. That is the median of tokens written one by one, the models in turn.",
        f"The run took {facts['total_s'] / 60:.1f} minutes and {facts['peak_gb']:.1f} GB of memory.",
        "**What this does not show.** A hundred thousand tokens are a thousandth of what a model needs to get used to "
        "skipping half of its neurons or more: that takes a GPU and about a hundred million tokens (`lte train`). And "
        "training itself is not faster: it runs all experts and masks them.",
    ]
