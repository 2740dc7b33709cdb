"""Speculative decoding of single requests over plain decoding, of one trained folder on edits of code and on chats.

    python benchmarks/speculation.py out --output speculation.json

All go through `generate` of transformers. `plain` is the accelerated model as ever, by whole decoding steps where an
engine computes it, as passes of up to 32 tokens that check drafts; `plain, by modules` the same without these. `lookup`
proposes what follows the last tokens elsewhere in the text (prompt_lookup_num_tokens), for the first number also in the
loop of transformers, where the host waits for each pass (`lookup of 5, told`). With --assistant also another model
proposes. Answers are greedy, and times are those after the prompt. `passes` says what one pass of lookup takes by how
many tokens are proposed, in plain decoding's answers: what the model computes, without the search for proposals.
`matches` counts in them, by tokens of the longest match, how often the first 0, 1, 2, ... after it were right.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import shlex
import statistics
import textwrap
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from ffn_rows import command_of, write_rows
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

import lte
from lte.bench.timing import Times, interleaved_times
from lte.eval.answers import first_difference
from lte.eval.inference import hard_inference
from lte.eval.models import load_any_model
from lte.eval.speculation import PassClock, closest_call, match_counts
from lte.hf.dense import load_tokenizer
from lte.hf.stepping import checked_model, has_engine
from lte.records import read_json

PLAIN, BY_MODULES = "plain", "plain, by modules"
Answer = Callable[[Tensor, PassClock], Tensor]
# Of one pass that is timed alone, at so many places of an answer.
PASS_REPEATS, PASS_PLACES = 60, 20

CODE = [
    *(textwrap.TextWrapper._wrap_chunks, textwrap.TextWrapper._handle_long_word, textwrap.dedent),
    *(
        shlex.shlex.read_token,
        inspect.getsourcefile,
        inspect.getcomments,
        statistics.quantiles,
        argparse.Action.__init__,
    ),
]
EDIT = "Add type hints to all parameters of this code and change nothing else. Answer with the whole code.\n\n{code}"
CHATS = [
    "Explain in a few sentences how a binary search works, and when it fails.",
    "Write a short letter to a neighbour about a parcel that came to the wrong house.",
    "What is the difference between a process and a thread?",
    "Give me a recipe for a simple vegetable soup for four people.",
    "Summarise the causes of the First World War for a pupil of twelve.",
    "Write a Python function that finds the longest word in a file, and explain it.",
    "Why is the sky blue at noon and red in the evening?",
    "Plan a weekend in a small town by the sea with two children.",
]


class NeverStops(StoppingCriteria):
    """A criterion of the caller's, for which the host must see each token."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """Goes on."""
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def prompts_of(tokenizer: Any, args: argparse.Namespace) -> list[tuple[str, Tensor]]:
    """The kind and the tokens [1, T] of each prompt."""
    edits = [EDIT.format(code=textwrap.dedent(inspect.getsource(each))) for each in CODE]
    texts: dict[str, list[str]] = {"edits": edits, "chats": CHATS}
    if args.prompts is not None:
        texts = read_json(args.prompts)
    found = []
    for kind, each in texts.items():
        for text in each[: args.count]:
            if tokenizer.chat_template is not None:
                messages = [{"role": "user", "content": text}]
                text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=tokenizer.chat_template is None)["input_ids"]
            found.append((kind, torch.tensor([ids[-args.prompt_length :]])))
    return found


def answering(model: Any, args: argparse.Namespace, **settings: Any) -> Answer:
    """A function that continues a prompt, and returns the answer [T]."""

    def answer(ids: Tensor, clock: PassClock) -> Tensor:
        moved = ids.to(model.device)
        pad = model.generation_config.pad_token_id
        made = model.generate(
            moved, attention_mask=torch.ones_like(moved), do_sample=False, max_new_tokens=args.tokens,
            pad_token_id=pad if pad is not None else 0, streamer=clock, **settings,
        )  # fmt: skip
        return made[0, ids.shape[1] :].cpu()

    return answer


def by_modules(model: Any, run: Answer) -> Answer:
    """As `run`, without whole decoding steps: these leave a model alone whose loop somebody has a part of."""

    def answer(ids: Tensor, clock: PassClock) -> Tensor:
        model.prepare_inputs_for_generation = model.prepare_inputs_for_generation
        try:
            return run(ids, clock)
        finally:
            del model.prepare_inputs_for_generation

    return answer


def providers_of(model: Any, args: argparse.Namespace) -> dict[str, Answer]:
    """What is timed, by name."""
    plain = answering(model, args)
    found = {PLAIN: plain} if args.no_modules else {PLAIN: plain, BY_MODULES: by_modules(model, plain)}
    for number in args.lookup:
        found[f"lookup of {number}"] = answering(model, args, prompt_lookup_num_tokens=number)
    for number in args.lookup[:1]:
        told = StoppingCriteriaList([NeverStops()])
        found[f"lookup of {number}, told"] = answering(
            model, args, prompt_lookup_num_tokens=number, stopping_criteria=told
        )
    if args.assistant is not None:
        assistant = lte.accelerate_(load_any_model(args.assistant, args.dtype))
        for number in args.draft_tokens:
            found[f"assistant, {number} tokens"] = assisted(model, assistant, number, args)
    return found


def assisted(model: Any, assistant: Any, number: int, args: argparse.Namespace) -> Answer:
    """The model with an assistant that proposes just so many tokens at a time."""
    run = answering(model, args, assistant_model=assistant)

    def answer(ids: Tensor, clock: PassClock) -> Tensor:
        settings = {"num_assistant_tokens": number, "num_assistant_tokens_schedule": "constant"}
        for name, value in {**settings, "assistant_confidence_threshold": 0.0}.items():
            setattr(assistant.generation_config, name, value)
        return run(ids, clock)

    return answer


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a saved LTE model")
    parser.add_argument("--assistant", help="a saved LTE model with the same tokens that proposes, too")
    parser.add_argument("--lookup", nargs="*", type=int, default=[5, 7])
    parser.add_argument("--draft-tokens", nargs="+", type=int, default=[3, 5], help="that the assistant proposes")
    parser.add_argument(
        "--no-modules", action="store_true", help="without plain decoding by modules, the slowest of all"
    )
    parser.add_argument("--prompts", type=Path, help="JSON: lists of prompts by kind; by default edits and chats")
    parser.add_argument("--count", type=int, default=8, help="prompts of each kind")
    parser.add_argument("--prompt-length", type=int, default=1024, help="tokens of a prompt that are kept, the last")
    parser.add_argument("--tokens", type=int, default=256, help="of an answer, at most")
    parser.add_argument("--rounds", type=int, default=3, help="after one that is not timed")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Times what the command line asks for."""
    args = parse(arguments)
    model = lte.accelerate_(load_any_model(args.folder, args.dtype))
    prompts = prompts_of(load_tokenizer(args.folder), args)
    with hard_inference(model):
        runs = providers_of(model, args)
        measured = measure(runs, prompts, args.rounds)
        kinds = list(dict.fromkeys(kind for kind, _ in prompts))
        rows = [row for kind in kinds for row in rows_of(kind, measured, prompts)]
        explain(model, rows, measured, prompts)
        passes = [each for kind in kinds for each in pass_times(model, kind, measured, prompts)]
    common = {"benchmark": "speculation", "dtype": args.dtype, "batch": 1, "max_tokens": args.tokens}
    header = {
        "model": args.folder,
        "assistant": args.assistant,
        "whole_steps": {PLAIN: has_engine(model)},
        "passes": passes,
        "matches": [matches_of(kind, measured[PLAIN], prompts) for kind in dict.fromkeys(kind for kind, _ in prompts)],
        "command": command_of("speculation", arguments),
    }
    write_rows(args.output, [{**common, **row} for row in rows], **header)
    for row in rows:
        print({name: value for name, value in row.items() if name != "differences"}, flush=True)
    for each in passes:
        print(each, flush=True)


@torch.no_grad()
def measure(
    runs: dict[str, Answer], prompts: list[tuple[str, Tensor]], rounds: int
) -> dict[str, list[tuple[Tensor, list[PassClock]]]]:
    """Of each provider, for each prompt: its answer, and the clocks of the rounds; the providers take turns."""
    found: dict[str, list[tuple[Tensor, list[PassClock]]]] = {name: [] for name in runs}
    for number, (kind, ids) in enumerate(prompts):
        clocks: dict[str, list[PassClock]] = {name: [] for name in runs}
        answers: dict[str, Tensor] = {}
        for turn in range(rounds + 1):
            for name, run in runs.items():
                clock = PassClock()
                answers[name] = run(ids, clock)
                # The first turn compiles, and sets up memory.
                clocks[name] += [clock] if turn else []
        for name, answer in answers.items():
            found[name].append((answer, clocks[name]))
        print(f"prompt {number + 1} of {len(prompts)}, {kind}: {ids.shape[1]} tokens", flush=True)
    return found


def rows_of(
    kind: str, measured: dict[str, list[tuple[Tensor, list[PassClock]]]], prompts: list[tuple[str, Tensor]]
) -> list[dict[str, Any]]:
    """A row for each provider: times of a token, how many times as fast as plain decoding, and how many at a time."""
    places = [index for index, (each, _) in enumerate(prompts) if each == kind]

    def medians(name: str) -> list[float]:
        return [statistics.median(clock.ms_per_token for clock in measured[name][index][1]) for index in places]

    found, plain = [], medians(PLAIN)
    for name, results in measured.items():
        clocks = [clock for index in places for clock in results[index][1]]
        ratios = Times.of([one / other for one, other in zip(plain, medians(name), strict=True)])
        differing = {
            index: place_of_difference(measured[PLAIN][index][0], results[index][0])
            for index in places
            if not torch.equal(measured[PLAIN][index][0], results[index][0])
        }
        found.append(
            {
                "provider": name,
                "kind": kind,
                "prompts": len(places),
                **asdict(Times.of([clock.ms_per_token for clock in clocks])),
                "speedup": {"median": ratios.median_ms, "p20": ratios.p20_ms, "p80": ratios.p80_ms},
                "tokens": sum(clock.tokens for clock in clocks) / len(clocks),
                "tokens_per_pass": sum(clock.tokens for clock in clocks) / sum(clock.passes for clock in clocks),
                "equal_answers": len(places) - len(differing),
                "differences": [{"prompt": index, "place": place} for index, place in differing.items()],
            }
        )
    return found


def matches_of(
    kind: str, plain: list[tuple[Tensor, list[PassClock]]], prompts: list[tuple[str, Tensor]]
) -> dict[str, Any]:
    """What lookup could have proposed in plain decoding's answers, by tokens of the match, and how much was right."""
    counts: dict[int, list[int]] = {}
    for (each, ids), (answer, _) in zip(prompts, plain, strict=True):
        if each == kind:
            for length, found in match_counts([*ids[0].tolist(), *answer.tolist()], ids.shape[1]).items():
                before = counts.get(length, [0] * len(found))
                counts[length] = [one + other for one, other in zip(before, found, strict=True)]
    return {"kind": kind, "counts": {str(length): found for length, found in sorted(counts.items())}}


@torch.no_grad()
def pass_times(
    model: Any,
    kind: str,
    measured: dict[str, list[tuple[Tensor, list[PassClock]]]],
    prompts: list[tuple[str, Tensor]],
) -> list[dict[str, Any]]:
    """What a pass over the last token and 0 to `most` - 1 proposed ones takes, at places all over a plain answer.

    With room for as many, as lookup has it: those that are not proposed are no tokens. `proposed` of `None` is a step
    of plain decoding. Nothing where no engine computes the model.
    """
    index = max((i for i, (each, _) in enumerate(prompts) if each == kind), key=lambda i: len(measured[PLAIN][i][0]))
    text = torch.cat([prompts[index][1][0], measured[PLAIN][index][0]]).to(model.device)
    checked = checked_model(model, text.device)
    if checked is None:
        return []
    cache, span = DynamicCache(config=model.config), checked.most
    model(text[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
    checked.take(cache, len(text), span)
    first = prompts[index][1].shape[1]
    places = torch.linspace(first, max(len(text) - span, first), PASS_PLACES).long().tolist()
    rows = torch.arange(span, device=text.device)

    def run(proposed: int | None) -> Callable[[], Tensor]:
        kept, given = rows[: 1 if proposed is None else span], list[tuple[Tensor, Tensor, Tensor]]()
        for place in places:
            ids = text[(place + kept).clamp(max=len(text) - 1)]
            given.append((ids, place + kept, torch.where(kept <= (proposed or 0), 0, place + kept + 1)))
        turns = itertools.cycle(given)
        return lambda: checked.logits_of(*next(turns)).argmax(-1)

    asked: list[int | None] = [None, *range(span)]
    runs = {str(each): run(each) for each in asked}
    times = interleaved_times(runs, text.device, PASS_REPEATS)
    return [{"kind": kind, "proposed": each, **asdict(Times.of(times[str(each)]))} for each in asked]


def place_of_difference(one: Tensor, other: Tensor) -> int:
    """Where two answers first differ, or the shorter one ends."""
    length = min(len(one), len(other))
    found = first_difference(one[:length], other[:length])
    return length if found is None else found


def explain(
    model: Any,
    rows: list[dict[str, Any]],
    measured: dict[str, list[tuple[Tensor, list[PassClock]]]],
    prompts: list[tuple[str, Tensor]],
) -> None:
    """Adds to each difference from plain decoding how close the model was to it; see `closest_call`."""
    for row in rows:
        for each in row["differences"]:
            answer = measured[PLAIN][each["prompt"]][0]
            text = torch.cat([prompts[each["prompt"]][1][0], answer[: each["place"]]])
            each.update(closest_call(model, text))


if __name__ == "__main__":
    main()
