"""How steady the routing of a saved LTE model is: what number formats, batches and kernels change in it.

Scores that lie near tau are on one side of it or the other by rounding alone. Each decision that flips moves the
hidden states and may flip others in later layers, and in the end other tokens are generated. Everything here compares
two runs over the same tokens; the words of the result say which.

Shapes: N rows of P tokens of a prompt and T more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lte.config import check_whole_number
from lte.eval.answers import PADDING, agreement, generate_greedily, greedy_answers
from lte.eval.decisions import (
    Decisions,
    NoStepsError,
    by_whole_steps,
    check_decoder,
    flips_by_layer,
    in_one_pass,
    near_threshold,
    token_by_token,
)
from lte.eval.inference import hard_inference
from lte.eval.models import load_any_model
from lte.hf.acceleration import accelerate_, decelerate_, describe_kernels
from lte.hf.inputs import check_tokens
from lte.hf.install import require_sparse_ffns
from lte.hf.stepping import has_engine
from lte.methods.method import densify_
from lte.nn.sparse_ffn import SparseFfn
from lte.records import environment

FORMATS = ("float32", "bfloat16")
DISTANCES = (0.001, 0.01, 0.05, 0.1, 0.2)
_Names: TypeAlias = tuple[str, str]
_Three: TypeAlias = tuple[Decisions, Decisions, Decisions]


@dataclass(frozen=True)
class SteadinessSettings:
    """What is compared.

    Attributes:
        prompts: N.
        prompt_length: P, tokens.
        tokens: T, of an answer.
        batch: rows that are read together, against one at a time.
    """

    prompts: int = 20
    prompt_length: int = 128
    tokens: int = 64
    batch: int = 8

    def __post_init__(self) -> None:
        for name, least in (("prompts", 2), ("prompt_length", 1), ("tokens", 2), ("batch", 2)):
            check_whole_number(name, getattr(self, name), least)


def measure_steadiness(
    model: str, ids: Tensor, settings: SteadinessSettings, say: Callable[[str], Any] = lambda text: None
) -> dict[str, Any]:
    """Compares the routing and the answers of a saved LTE model with themselves.

    Args:
        model: folder or hub name.
        ids: text, at most N rows of P + T tokens, [N, P + T]. Decisions are compared on all of them, answers are those
            to the first P.
        settings: as `ids`, and the batch.
        say: is told what is measured next.

    Returns:
        JSON-ready: the environment and the settings; by number format `sparsity`, `near_threshold` (share of the scores
        within a distance of tau, by distance, in all and by layer) and `kernels`; and `pairs`, each of two runs:

        - `pair`, `one` and `other` say which;
        - `flips` and `flips_by_layer`: share of the decisions that differ, each run on the hidden states of its own;
        - `own_flips` and `own_flips_by_layer`: the same where the blocks of `other` read the hidden states of `one`, so
          that no layer answers for those before it;
        - `answers`: see `lte.eval.answers.agreement`, and `dense_answers`, that of the dense model of the same weights;
        - `note`: why something of it was not measured.

    Raises:
        ValueError: for a dense model or one with an encoder, or tokens that it does not take.
    """
    runs, pairs = list[_Run](), list[dict[str, Any]]()
    for dtype in FORMATS:
        run = _Run(model, dtype, ids.cpu(), settings, say)
        pairs += [run.against(runs[0])] if runs else []
        pairs += [run.in_a_batch(0), run.in_a_batch(PADDING), run.token_by_token()]
        pairs += run.on_kernels()
        run.become_dense_()
        if runs:
            formats = next(pair for pair in pairs if pair["pair"] == "formats")
            formats["dense_answers"] = agreement(runs[0].dense_answers["alone"], run.dense_answers["alone"])
        for pair in pairs:
            if pair["dtype"] == dtype and pair["pair"] in run.dense_answers:
                pair["dense_answers"] = agreement(run.dense_answers["alone"], run.dense_answers[pair["pair"]])
        runs.append(run)
    of_formats = {run.dtype: run.summary for run in runs}
    return {
        **environment(),
        "model": model,
        **asdict(settings),
        "prompts": len(ids),
        "padding": PADDING,
        **{name: {dtype: each[name] for dtype, each in of_formats.items()} for name in runs[0].summary},
        "pairs": pairs,
    }


class _Run:
    """A model in one number format, in plain PyTorch with all rows alone, and what is compared with that.

    Attributes:
        alone: its decisions.
        answers: to the prompts.
        dense_answers: of the dense model, by the way in which the prompts are read.
        summary: what there is to say of the format.
    """

    def __init__(self, name: str, dtype: str, ids: Tensor, settings: SteadinessSettings, say: Callable[[str], Any]):
        self.dtype, self.ids, self.settings, self.say = dtype, ids, settings, say
        self.prompts = ids[:, : settings.prompt_length]
        say(f"{dtype}: plain PyTorch, each text alone")
        self.model: Any = load_any_model(name, dtype)
        check_decoder(self.model)
        check_tokens(self.model, ids)
        self.alone = in_one_pass(self.model, ids, keep=True)
        self.answers = greedy_answers(self.model, self.prompts, settings.tokens)
        self.dense_answers: dict[str, Tensor] = {}
        threshold = torch.sigmoid(torch.tensor(_first_ffn(self.model).threshold_logit, dtype=torch.float64)).item()
        near = near_threshold(self.alone, threshold, DISTANCES)
        self.summary: dict[str, Any] = {
            "sparsity": 1 - self.alone.active.double().mean().item(),
            "near_threshold": {str(far): {"share": _mean(each), "by_layer": each} for far, each in near.items()},
            "kernels": None,
        }

    def against(self, other: _Run) -> dict[str, Any]:
        """The number format of another run against this one."""
        own = in_one_pass(self.model, self.ids, given=other.alone.inputs)
        found = _pair("formats", (f"{other.dtype}, alone", f"{self.dtype}, alone"), (other.alone, self.alone, own))
        return {**found, "dtype": None, "answers": agreement(other.answers, self.answers)}

    def in_a_batch(self, padding: int) -> dict[str, Any]:
        """Each text alone against a batch."""
        batch = self.settings.batch
        way = f"{batch} together" + (f", {padding} tokens of padding" if padding else "")
        self.say(f"{self.dtype}: {way}")
        other = in_one_pass(self.model, self.ids, batch, padding)
        own = in_one_pass(self.model, self.ids, batch, padding, given=self.alone.inputs)
        answers = greedy_answers(self.model, self.prompts, self.settings.tokens, batch, padding)
        found = self._pair("padded_batch" if padding else "batch", ("alone", way), (self.alone, other, own))
        return {**found, "answers": agreement(self.answers, answers)}

    def token_by_token(self) -> dict[str, Any]:
        """All tokens in one pass against one after the other, as they are generated."""
        self.say(f"{self.dtype}: one token after the other")
        self.steps = token_by_token(self.model, self.ids, self.settings.prompt_length, keep=True)
        own = token_by_token(self.model, self.ids, self.settings.prompt_length, given=self.alone.inputs)
        return self._pair(
            "token_by_token", ("in one pass", "token by token"), (self.alone, self.steps, own), steps=True
        )

    def on_kernels(self) -> list[dict[str, Any]]:
        """Plain PyTorch against the kernels, module by module and by whole decoding steps."""
        self.say(f"{self.dtype}: kernels")
        model, ids, length = self.model, self.ids, self.settings.prompt_length
        try:
            accelerate_(model)
        except ValueError as error:
            return [self._none("kernels", str(error)), self._none("whole_steps", str(error))]
        self.summary["kernels"] = describe_kernels(model)
        other, own = in_one_pass(model, ids), in_one_pass(model, ids, given=self.alone.inputs)
        names = "plain, in one pass", "kernels, in one pass"
        found = [self._pair("kernels", names, (self.alone, other, own))]
        other, own = token_by_token(model, ids, length), token_by_token(model, ids, length, self.steps.inputs)
        names = "plain, token by token", "kernels, token by token"
        answers = greedy_answers(model, self.prompts, self.settings.tokens)
        pair = self._pair("kernels_token_by_token", names, (self.steps, other, own), steps=True)
        found += [{**pair, "answers": agreement(self.answers, answers)}, self._whole_steps()]
        decelerate_(model)
        del self.steps
        return found

    def _whole_steps(self) -> dict[str, Any]:
        model, ids, length = self.model, self.ids, self.settings.prompt_length
        self.say(f"{self.dtype}: whole decoding steps")
        with hard_inference(model):
            try:
                other = by_whole_steps(model, ids, length)
                own = by_whole_steps(model, ids, length, self.steps.inputs)
            except NoStepsError as error:
                return self._none("whole_steps", f"not measured, as {error}")
            rows = [generate_greedily(model, row, self.settings.tokens) for row in self.prompts.split(1)]
            answers = torch.cat(rows)[:, length:].cpu()
            if not has_engine(model):
                return self._none("whole_steps", "generate did not take whole decoding steps")
        names = "plain, token by token", "whole decoding steps"
        found = self._pair("whole_steps", names, (self.steps, other, own), steps=True)
        return {**found, "answers": agreement(self.answers, answers)}

    def become_dense_(self) -> None:
        """Answers as the dense model of the same weights, and lets go of it."""
        self.say(f"{self.dtype}: answers of the dense model of the same weights")
        densify_(self.model)
        batch, tokens = self.settings.batch, self.settings.tokens
        for name, size, padding in (("alone", 1, 0), ("batch", batch, 0), ("padded_batch", batch, PADDING)):
            self.dense_answers[name] = greedy_answers(self.model, self.prompts, tokens, size, padding)
        self.model = None

    def _pair(self, name: str, names: _Names, runs: _Three, *, steps: bool = False) -> dict[str, Any]:
        return {**_pair(name, names, runs, self.settings.prompt_length if steps else 0), "dtype": self.dtype}

    def _none(self, name: str, note: str) -> dict[str, Any]:
        empty = dict.fromkeys(("one", "other", *_NUMBERS, "answers", "dense_answers"))
        return {"pair": name, **empty, "note": note, "dtype": self.dtype}


_NUMBERS = ("flips", "flips_by_layer", "own_flips", "own_flips_by_layer")


def _pair(name: str, names: _Names, runs: _Three, first: int = 0) -> dict[str, Any]:
    """How far runs agree from the token `first` on: the one, the other, and the other on the one's hidden states."""
    reference, other, given = runs
    flips, own_flips = (flips_by_layer(reference, each, first) for each in (other, given))
    numbers = (_mean(flips), flips, _mean(own_flips), own_flips)
    said = dict(zip(("pair", "one", "other", *_NUMBERS), (name, *names, *numbers), strict=True))
    return {**said, "answers": None, "dense_answers": None, "note": None}


def _first_ffn(model: Any) -> SparseFfn:
    return next(iter(require_sparse_ffns(model).values()))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
