"""`lte generate`: text from a model, and how many neurons it took."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from lte.cli.command import (
    MAX_SEED,
    KernelsOption,
    TargetOption,
    check_model,
    check_target,
    move_to_target_,
    quiet_transformers,
    reports_errors,
    utf8,
)
from lte.config import DTYPE_NAMES, KERNELS, check_choice

if TYPE_CHECKING:
    from torch import Tensor

COMPARED_TOKENS = 32


@reports_errors
def generate(
    model: Annotated[str, typer.Argument(help="Folder, hub name, or GGUF file; dense or LTE.")],
    prompt: Annotated[str, typer.Option(help="Text to continue, or with --chat the user's message.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token; higher is more varied.")
    ] = 0.0,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")] = False,
    dtype: Annotated[str, typer.Option(help="Of the weights.", metavar="float32|bfloat16|float16")] = "float32",
    kernels: KernelsOption = "auto",
    target_sparsity: TargetOption = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the sampling.")] = 0,
    compare_dense: Annotated[
        bool,
        typer.Option(
            "--compare-dense",
            help="Afterwards also time the same weights with all neurons on, as plain transformers runs them, for at "
            f"most {COMPARED_TOKENS} tokens.",
        ),
    ] = False,
) -> None:
    """Continues a prompt and says how fast, and what share of its neurons the model used for this text.

    Example: `lte generate out --prompt "What is a Python list?" --chat`
    """
    check_choice("dtype", dtype, DTYPE_NAMES)
    check_choice("kernels", kernels, KERNELS)
    if not prompt:
        raise ValueError("prompt must hold at least one character, got an empty one")
    prompt = utf8("prompt", prompt)
    check_target(target_sparsity, check_model("model", model))

    import torch
    from transformers import TextStreamer

    from lte.eval.models import is_lte, load_any_model, load_config
    from lte.eval.speed import TokenClock
    from lte.hf.dense import load_tokenizer

    quiet_transformers()
    config = load_config(model)
    if compare_dense and not is_lte(config):
        raise ValueError(f"--compare-dense must be given with an LTE model, got model={model}; leave it out")
    tokenizer = load_tokenizer(model)
    loaded = load_any_model(model, dtype, kernels)
    move_to_target_(loaded, target_sparsity)
    torch.manual_seed(seed)
    ids = encode_prompt(tokenizer, prompt, chat).to(loaded.device)
    if not chat:
        typer.echo(prompt, nl=False)
    clock = TokenClock(TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
    # What is told on the way would stand between the prompt and the answer.
    with warnings.catch_warnings(record=True) as told:
        output = generate_ids(loaded, tokenizer, ids, max_new_tokens, temperature, clock)
    console = Console(stderr=True, style="dim", highlight=False, soft_wrap=True)
    for warning in told:
        console.print(f"Warning: {warning.message}", markup=False)
    if clock.token_s:
        console.print(describe_speed(loaded, clock.token_s))
    console.print(describe_use(loaded, output))
    if compare_dense and clock.token_s:
        console.print(dense_speed(loaded, tokenizer, ids, clock.token_s))


def describe_speed(model: Any, token_s: Sequence[float]) -> str:
    """A sentence on how fast an answer came.

    Args:
        model: that wrote it.
        token_s: seconds from each token to the next.
    """
    from lte.hf.stepping import has_engine

    steps = ", by whole decoding steps" if has_engine(model) else ""
    return f"{1 / median(token_s):.1f} tokens per second (median of {len(token_s)} after the first{steps})."


def dense_speed(model: Any, tokenizer: Any, ids: Tensor, token_s: Sequence[float]) -> str:
    """A sentence on how fast an LTE model's weights are with all neurons on in plain transformers.

    Args:
        model: which becomes that dense model.
        tokenizer: its tokenizer.
        ids: the prompt [1, T].
        token_s: seconds from each token to the next of the sparse model.
    """
    from lte.eval.speed import TokenClock
    from lte.methods import densify_

    clock, count = TokenClock(), min(len(token_s) + 1, COMPARED_TOKENS)
    generate_ids(densify_(model), tokenizer, ids, count, streamer=clock, min_new_tokens=count)
    ratio = median(token_s) / median(clock.token_s)
    return (
        f"{1 / median(clock.token_s):.1f} tokens per second with all neurons on, the same weights in plain "
        f"transformers; the sparse model takes {ratio:.2f} of that time."
    )


def encode_prompt(tokenizer: Any, prompt: str, chat: bool) -> Tensor:
    """Token ids [1, T] of a prompt.

    Raises:
        ValueError: for a prompt that makes no tokens, or `chat` without a chat template or with one that fails.
    """
    if chat and not tokenizer.chat_template:
        raise ValueError("--chat must have a chat template, and this model's tokenizer has none; leave it out")
    if chat:
        messages = [{"role": "user", "content": prompt}]
        try:
            prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # A template may do anything.
            raise ValueError(
                f"--chat must have a chat template that works, got one of {tokenizer.name_or_path} that fails with "
                f"{type(error).__name__}: {error}; mend it there, or leave --chat out"
            ) from error
    ids = tokenizer(prompt, add_special_tokens=not chat, return_tensors="pt")["input_ids"]
    if not ids.numel():
        raise ValueError(f"prompt must make at least one token, got prompt={prompt!r}, which makes none")
    return ids.long()


def generate_ids(
    model: Any,
    tokenizer: Any,
    ids: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    streamer: Any = None,
    **settings: Any,
) -> Tensor:
    """Prompt and continuation [1, T] together; it ends where the model has no further position.

    Args:
        model: a language model.
        tokenizer: its tokenizer.
        ids: the prompt [1, T].
        max_new_tokens: of the continuation.
        temperature: of the sampling; 0 takes the likeliest token.
        streamer: gets the tokens as they come.
        settings: further ones of `generate`.

    Raises:
        ValueError: for a prompt that the model cannot read.
    """
    import torch

    from lte.hf.inputs import check_tokens, longest_input

    check_tokens(model, ids)
    longest = longest_input(model)
    if longest is not None and not model.config.is_encoder_decoder:
        # The last token is written, not read: a prompt that fills all positions gets one.
        room = max(1, longest - ids.shape[1])
        if max_new_tokens > room:
            typer.echo(f"The model has {longest} positions: the answer ends after at most {room} tokens.", err=True)
        max_new_tokens = min(max_new_tokens, room)
    # A greedy run must not warn of the sampling values that the checkpoint's generation config brings.
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    with torch.no_grad():
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            num_beams=1,  # Several, which a checkpoint may ask for, write nothing before the end.
            pad_token_id=tokenizer.pad_token_id,
            streamer=streamer,
            **settings,
            **({"do_sample": True, "temperature": temperature} if temperature > 0 else greedy),
        )


def describe_use(model: Any, ids: Tensor) -> str:
    """A sentence on the share of FFN neurons that the text `ids` [1, T] took."""
    from lte.eval.sparsity import measure_sparsity
    from lte.hf.inputs import longest_input
    from lte.hf.install import sparse_ffns

    if not sparse_ffns(model):
        return f"Dense model: all FFN neurons were used for each of these {ids.shape[1]} tokens."
    ids = ids[:, : longest_input(model)]
    measured = measure_sparsity(model, [{"input_ids": ids, "labels": ids}])
    return (
        f"{100 * (1 - measured.sparsity):.1f}% of the FFN neurons were used for these {measured.tokens} tokens "
        f"(prompt and answer, mean over tokens and layers)."
    )
