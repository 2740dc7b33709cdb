"""What the demo says: its explanation, its result table, and the notes of its report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from lte.eval.flops import GFLOP
from lte.records import ResultRecord

PROMPT = "In Python, the with statement is used to"
EXPLANATION = (
    "A language model runs all neurons of its feed-forward layers (FFNs) for every token. Here a small model learns to "
    "skip some of them: its neurons are grouped into experts, a router in every layer decides for every token which "
    "experts run, and training adapts the model to that. The original model is the teacher: the sparse model learns "
    "to predict what the original predicts."
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
        facts: steps, tokens, step_s, max_steps, checks, total_s, peak_gb of the run.
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
        f"The run took {facts['total_s'] / 60:.1f} minutes and {facts['peak_gb']:.1f} GB of memory.",
        "**What this does not show.** A hundred thousand tokens are a thousandth of what a model needs to get used to "
        "skipping half of its neurons or more: that takes a GPU and about a hundred million tokens (`lte train`). And "
        "FLOPs are counted, not timed: training runs all experts and masks them.",
    ]
