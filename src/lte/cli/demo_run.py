"""The steps of `lte demo`."""

from __future__ import annotations

import copy
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel

import lte
from lte.cli.demo_budget import Budget, time_step, timed
from lte.cli.demo_text import EXPLANATION, PROMPT, report_notes, result_table
from lte.cli.generate import describe_use, encode_prompt, generate_ids
from lte.config import LteConfig
from lte.data.config import DataConfig
from lte.data.rows import LmCollator, load_lm_datasets
from lte.eval.models import (
    evaluation_record,
    held_out_batches,
    load_any_model,
    max_positions,
    measurement_summary,
    save_folder,
)
from lte.eval.perplexity import evaluate_model
from lte.eval.sparsity import Measurement, measure_sparsity
from lte.hf.dense import load_tokenizer
from lte.hf.install import sparse_ffns
from lte.records import ResultRecord
from lte.report.demo_report import write_demo_report
from lte.train.config import TrainConfig
from lte.train.processes import training_device
from lte.train.router_init import calibrate_thresholds_, fit_routers_
from lte.train.summary import TrainingSummary
from lte.train.two_stage import device_batches, train_two_stage

# 1024 tokens a step: more would not fit the memory, and not be faster on a CPU.
BATCH_SIZE, SEQUENCE_LENGTH, HELD_OUT_TOKENS = 4, 256, 8192
FIT_TOKENS, CALIBRATION_TOKENS = 8192, 8192
GENERATED_TOKENS = 40


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


@dataclass
class Demo:
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
        self.tokenizer = load_tokenizer(self.model)
        model = load_any_model(self.model)
        if sparse_ffns(model):
            raise ValueError(f"model must be dense for the demo, got the LTE model {self.model}")
        self.load_data(model)
        eval_s = timed(lambda: self.evaluate(model, "dense"))
        self.samples["dense"] = self.write(model)
        teacher = copy.deepcopy(model).to(torch.bfloat16)
        self.say("2/6 Group the FFN neurons into experts, give every layer a router")
        self.convert_(model)
        self.say("3/6 Train: stage 1 (model and routers), stage 2 (adaptation)")
        summary = self.train(model, teacher, eval_s)
        self.say("4/6 Measure and save")
        measurement = self.evaluate(model, "sparse", summary)
        model.config.lte_measurement = measurement_summary(measurement, self.data.info, {"model": str(self.model)})
        save_folder(model, self.tokenizer, self.output)
        self.say("5/6 Load the folder again and compare")
        loaded = self.reload(model, measurement)
        self.samples["sparse"] = self.write(loaded)
        self.say("6/6 Report")
        self.report(summary, measurement)

    def say(self, text: str) -> None:
        """Prints the heading of a step with the time so far."""
        self.console.print(f"\n[bold]{text}[/bold] [dim]({self.budget.elapsed_s():.0f} s)[/dim]", highlight=False)

    def load_data(self, model: Any) -> None:
        """Sets `data` and the held-out `batches`."""
        length = min(SEQUENCE_LENGTH, max_positions(model) or SEQUENCE_LENGTH)
        config = DataConfig(
            sequence_length=length,
            validation_fraction=0.1,
            max_validation_tokens=HELD_OUT_TOKENS,
            data_seed=self.seed,
        )
        self.data_config, self.data = config, load_lm_datasets(config, self.tokenizer)
        self.collator = LmCollator(self.tokenizer.pad_token_id)
        self.batches = held_out_batches(self.data.validation, BATCH_SIZE, self.tokenizer.pad_token_id)
        info = self.data.info
        self.console.print(
            f"Text: Python's help topics, {info['train']['tokens']} tokens to train on, "
            f"{info['validation']['tokens']} of other documents held out.",
            highlight=False,
        )

    def evaluate(self, model: Any, name: str, summary: TrainingSummary | None = None) -> Any:
        """Records and prints the perplexity of a model on the held-out text; returns its routing."""
        seconds = time.monotonic()
        with torch.autocast(training_device().type, torch.bfloat16):
            perplexity, measurement = evaluate_model(model, self.batches)
        self.records[name] = evaluation_record(
            model,
            perplexity,
            measurement,
            task=self.data_config.task,
            model=Path(self.model).name,
            seed=self.seed,
            tokens_trained=summary.tokens_trained if summary else 0,
            wall_time_s=summary.wall_time_s if summary else time.monotonic() - seconds,
            config={"recipe": RECIPE, "data": vars(self.data_config), "data_info": self.data.info, **self.facts},
        )
        sparsity = "" if measurement is None else f", {100 * measurement.sparsity:.1f}% of FFN neurons skipped"
        self.console.print(f"{name}: perplexity {perplexity.perplexity:.2f}{sparsity}.", highlight=False)
        return measurement

    def write(self, model: Any) -> str:
        """What a model makes of the prompt, greedily."""
        ids = encode_prompt(self.tokenizer, PROMPT, chat=False).to(model.device)
        output = generate_ids(model, self.tokenizer, ids, GENERATED_TOKENS)
        text = str(self.tokenizer.decode(output[0], skip_special_tokens=True))
        self.console.print(f"It writes: [italic]{escape(text)}[/italic]", highlight=False)
        self.console.print(describe_use(model, output), style="dim", highlight=False)
        return text

    def convert_(self, model: Any) -> None:
        """Makes the model sparse, fits its routers and sets the thresholds to the target."""
        lte.sparsify_(model, LteConfig(target_sparsity=self.target_sparsity, seed=self.seed))
        ffn = next(iter(sparse_ffns(model).values()))
        self.console.print(
            f"{len(sparse_ffns(model))} layers, each with {ffn.num_experts} experts of "
            f"{ffn.num_neurons // ffn.num_experts} neurons. Routers start from a fit to the experts' norms.",
            highlight=False,
        )
        with torch.autocast(training_device().type, torch.bfloat16):
            fit_routers_(model, device_batches(model, self.data.train, FIT_TOKENS, BATCH_SIZE, self.collator))
            batches = device_batches(model, self.data.train, FIT_TOKENS // 2, BATCH_SIZE, self.collator)
            calibrate_thresholds_(model, batches, self.target_sparsity, rounds=2)
        self.evaluate(model, "sparse, untrained")

    def train(self, model: Any, teacher: Any, eval_s: float) -> TrainingSummary:
        """Both stages, with as many steps as the time allows."""
        step_s = time_step(model, teacher, self.collator([self.data.train[i] for i in range(BATCH_SIZE)]))
        # After training: up to 4 rounds of calibration, 2 evaluations, writing, saving, pictures.
        rest_s = 6 * eval_s + 15
        steps = self.budget.steps(step_s, rest_s, self.max_steps)
        self.facts |= {"steps": steps, "step_s": step_s, "max_steps": self.max_steps}
        self.console.print(f"One step takes {step_s:.1f} s here: {steps[0]} + {steps[1]} steps.", highlight=False)
        config = TrainConfig(
            stage1_steps=steps[0],
            stage2_steps=steps[1],
            logging_steps=max(1, sum(steps) // 24),
            seed=self.seed,
            **RECIPE,  # type: ignore[arg-type]
        )
        folder = self.output / "training"
        shutil.rmtree(folder, ignore_errors=True)
        summary = train_two_stage(model, self.data.train, config, folder, teacher=teacher, data_collator=self.collator)
        shutil.rmtree(folder)
        self.facts["tokens"] = summary.tokens_trained
        return summary

    def reload(self, model: Any, measurement: Measurement) -> Any:
        """The saved model, verified against the one in memory.

        Raises:
            RuntimeError: if it computes anything else.
        """
        loaded = load_any_model(str(self.output))
        model.eval()
        ids = self.batches[0]["input_ids"].to(training_device())
        with torch.no_grad():
            equal = torch.equal(model(input_ids=ids).logits, loaded(input_ids=ids).logits)
        with torch.autocast(training_device().type, torch.bfloat16):
            again = measure_sparsity(loaded, self.batches)
        if not equal or again != measurement:
            raise RuntimeError(f"the folder {self.output} computes something else than the model that was saved")
        checks = ["the saved folder, loaded again, gives bit-equal logits", "and the same sparsity"]
        self.facts["checks"] = checks
        self.console.print(f"{' '.join(checks).capitalize()} ({100 * again.sparsity:.2f}%).", highlight=False)
        return loaded

    def report(self, summary: TrainingSummary, measurement: Measurement) -> None:
        """Writes the report and prints its numbers."""
        self.facts |= {"total_s": self.budget.elapsed_s(), "peak_gb": peak_memory_gb()}
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
            f"Try: lte inspect {self.output}; lte generate {self.output} --prompt 'A list is'",
            highlight=False,
            soft_wrap=True,
        )


def peak_memory_gb() -> float:
    """The most memory that this process held, in 10^9 bytes."""
    import resource  # not on Windows, where the other commands run

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
