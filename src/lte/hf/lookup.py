"""Prompt lookup by whole decoding steps, where the device goes from pass to pass without asking the host.

`generate(prompt_lookup_num_tokens=K)` proposes what followed the last tokens where they stood before, and keeps what
the model writes itself. In the loop of transformers the host learns after each pass which tokens stay and looks for
the next proposal, for which a GPU waits as long as a step of a small model takes. Here proposals and the count of what
stays are tensors on the device, and the host hears of a pass while the next one runs. The proposals are those of
transformers: what followed the first place with the longest match, of up to `max_matching_ngram_size` tokens. A pass
always has room for as many, and those that there are not cost it little, as the engine is told so on the device. Where
nothing of them stayed for some passes, the passes after them have room for a single one, until one stays.

Greedy answers to one sequence alone; logits processors, sampling and scores are left to the loop of transformers.

Shapes: K proposed tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from lte.hf.checking import CheckedModel, grows, starts_of
from lte.hf.told import Told, runs_ahead

# What `generate` may ask for that needs more than tokens.
_ASKED = ("do_sample", "output_scores", "output_logits", "assistant_early_exit", "assistant_ensemble_weight")
# After so many passes in a row of which no proposed token stayed, one is proposed: a pass of few tokens reads less.
MISSES = 2
# Tokens of a text for which there are places on the device from the start; each pass goes through all of them.
LONGEST = 2**20
# Of the longest match that is looked for, where the caller does not say it: transformers' own.
GRAM = 2


def lookup_of(
    checked: CheckedModel,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
) -> Lookup | None:
    """What runs a call of prompt lookup, `None` if that is left to transformers."""
    proposed, gram = generation_config.prompt_lookup_num_tokens, generation_config.max_matching_ngram_size or GRAM
    if proposed is None or any(getattr(generation_config, name, None) for name in _ASKED) or logits_processor:
        return None
    if not runs_ahead(input_ids.device):
        return None  # then each pass may as well read what was found, and no more
    if any(type(criterion) not in (MaxLengthCriteria, EosTokenCriteria) for criterion in stopping_criteria):
        return None
    lengths = [each.max_length for each in stopping_criteria if type(each) is MaxLengthCriteria]
    longest, length = min(lengths, default=0), input_ids.shape[1]
    if not length < longest <= LONGEST or len(input_ids) > 1:
        return None
    if not 1 <= proposed < checked.calls * checked.most or gram < 1:
        return None
    cache: Any = model_kwargs.get("past_key_values")
    if not grows(cache, checked.plan) or cache.get_seq_length():
        return None
    if any(getattr(layer, "record_past", False) for layer in cache.layers):
        return None
    starts = starts_of(input_ids, model_kwargs.get("attention_mask"), model_kwargs.get("position_ids"), length)
    if starts is None:
        return None
    ends = [each.eos_token_id.reshape(-1) for each in stopping_criteria if type(each) is EosTokenCriteria]
    ends_of = torch.cat(ends).to(input_ids.device) if ends else None
    return Lookup(checked, cache, starts, proposed, gram, longest, ends_of)


@dataclass
class Lookup:
    """One call of `generate`.

    Attributes:
        checked: has the engine and the memory.
        cache: of the caller.
        starts: where the text begins in the cache [1].
        proposed: K.
        gram: tokens of the longest match.
        longest: tokens of the text at most.
        ends: tokens that end it.
    """

    checked: CheckedModel
    cache: Any
    starts: Tensor
    proposed: int
    gram: int
    longest: int
    ends: Tensor | None

    def run(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], streamer: Any
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """As `_assisted_decoding` of transformers."""
        found = self.checked.model._prefill(input_ids, generation_config, model_kwargs, is_first_iteration=True)
        first = found.logits[:, -1].argmax(-1)
        self._write(input_ids, first)
        known, span = input_ids.shape[1] + 1, self.proposed + 1
        told = Told(span + 3, input_ids)
        goes_on = known < self.longest and not (self.ends is not None and bool(torch.isin(first, self.ends)))
        if streamer is not None:
            streamer.put(first.cpu()[None])
        try:
            if goes_on:
                self._make_room(known)
                told.tell(self._pass(self.proposed))
            misses = 0
            while goes_on:
                # One pass may have brought all its tokens, and the one after it reads as many again.
                launched = known - 1 + 2 * span <= self._room
                proposed = self.proposed if misses < MISSES else 1
                if launched:
                    following = self._pass(proposed)
                *chosen, kept, offered, ended = told.wait().tolist()
                known, misses = known + kept, 0 if kept > 1 else misses + (offered > 0)
                if streamer is not None:
                    streamer.put(torch.tensor([chosen[:kept]], device="cpu"))
                if ended:
                    break
                if not launched:
                    self._make_room(known)
                    following = self._pass(proposed)
                told.tell(following)
        finally:
            self._show(known - 1)
        if streamer is not None:
            streamer.end()
        sequences = self._text[None, self.gram : self.gram + known].clone()
        if not generation_config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(sequences=sequences, past_key_values=self.cache)  # type: ignore[arg-type]

    def _write(self, input_ids: Tensor, first: Tensor) -> None:
        """Begins the text on the device: the prompt, its first token, and places for what is to come."""
        length, device = input_ids.shape[1], input_ids.device
        # Before the text stand tokens that are none, so that all places have others before them.
        places = self.longest + self.proposed + 1
        self._text = torch.zeros(self.gram + places, dtype=torch.int64, device=device)
        self._text[: self.gram] = -1
        self._text[self.gram : self.gram + length] = input_ids[0]
        self._text[self.gram + length] = first[0]
        self._places = torch.arange(places, device=device)
        self._offsets = torch.arange(self.proposed + 1, device=device)
        self._known = torch.full((), length + 1, dtype=torch.int64, device=device)
        self._ended = torch.zeros((), dtype=torch.bool, device=device)
        self._room = 0

    def _proposal(self, last: Tensor, proposed: int) -> tuple[Tensor, Tensor]:
        """What followed the last tokens where they stood before, [n], and how many tokens that is.

        Args:
            last: the place of the last token.
            proposed: n.
        """
        count, alike = len(self._places), self._places < last
        matched = torch.zeros_like(self._places)
        for back in range(self.gram):
            token = self._text[(last + self.gram - back)[None]]
            alike = alike & (self._text[self.gram - back : self.gram - back + count] == token)
            matched += alike
        # Of the longest matches the first.
        place = (matched * count - self._places).argmax()
        offered = (last - place).clamp(max=proposed) * (matched[place[None]][0] > 0)
        return self._text[place + self.gram + 1 + self._offsets[:proposed]], offered

    def _pass(self, proposed: int) -> Tensor:
        """Reads the last token and up to n proposed ones.

        After the end of the text nothing stays, so that a pass that began too early does no harm.

        Returns:
            The tokens that the model writes after each of them, filled up to K + 1, how many of these stay, how many were
            proposed, and whether the text has ended: [K + 4].
        """
        last, over, offsets = self._known - 1, self._ended, self._offsets[: proposed + 1]
        proposal, offered = self._proposal(last, proposed)
        tokens, positions = torch.cat([self._text[(last + self.gram)[None]], proposal]), last + offsets
        # A token that begins after its position is none.
        starts = torch.where(offsets <= offered, self.starts, positions + 1)
        chosen = self.checked.logits_of(tokens, positions, starts).argmax(-1)
        kept = ((chosen[:-1] == proposal) & (offsets[1:] <= offered)).long().cumprod(0).sum() + 1
        if self.ends is not None:
            # For many tokens isin would wait for the device.
            end = torch.where((chosen[:, None] == self.ends).any(1), offsets, proposed + 1).min()
            self._ended = self._ended | (end < kept)
            kept = torch.minimum(kept, end + 1)
        kept = torch.clamp(kept, max=self.longest - self._known).masked_fill(over, 0)
        # What does not stay is written anew before it is read.
        self._text[self._known + self.gram + offsets] = chosen
        self._known = self._known + kept
        self._ended = self._ended | (self._known >= self.longest)
        chosen = functional.pad(chosen, (0, self.proposed - proposed))
        return torch.cat([chosen, kept[None], offered[None], self._ended[None]])

    def _make_room(self, known: int) -> None:
        """Has the cache in memory in which another pass has room."""
        span = self.proposed + 1
        if known - 1 + span > self._room:
            self._show(known - 1)
            # With what a pass reads in vain, and one that begins before that is known.
            self._room = self.checked.take(self.cache, known - 1, span, self.longest - known + 2 * span)

    def _show(self, length: int) -> None:
        """Has the caller's cache hold so many tokens, as after the loop of transformers."""
        if not self._room:
            return  # it has what the prompt has written
        for layer, taken, planned in zip(self.cache.layers, self.checked.layers, self.checked.plan.layers, strict=True):
            held, end = length, length + taken.shift
            if isinstance(layer, DynamicSlidingWindowLayer):
                held, layer.cumulative_length = min(length, planned.window - 1), length
            layer.keys, layer.values = (tensor[:, :, end - held : end] for tensor in (taken.keys, taken.values))
