"""Prompt lookup by whole decoding steps, where the device goes from pass to pass without asking the host.

`generate(prompt_lookup_num_tokens=K)` proposes what followed the last tokens where they stood before, and keeps what
the model writes itself. In the loop of transformers the host learns after each pass which tokens stay and looks for
the next proposal, for which a GPU waits as long as a step of a small model takes. Here proposals and the count of what
stays are tensors on the device, and the host hears of a pass while the next one runs. Proposals come from the longest
match; a long one proposes up to K tokens and what one call of the engine reads, a short one fewer, and none while such
matches are right too rarely in this answer. A pass always has room for as many, and those that there are not cost it
little, as the engine is told so on the device.

Of several matches transformers takes the first. Here that holds for those of at least 4 tokens, which are mostly a text
that is being copied; of shorter ones the last is taken, as a text repeats what it said lately.

Greedy answers to one sequence alone; logits processors, sampling and scores are left to the loop of transformers.

Shapes: K proposed tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from lte.hf.checking import CheckedModel, grows, starts_of
from lte.hf.told import Told, runs_ahead

if TYPE_CHECKING:
    from lte.ops.lookup import LookupText

# What `generate` may ask for that needs more than tokens.
_ASKED = ("do_sample", "output_scores", "output_logits", "assistant_early_exit", "assistant_ensemble_weight")
# Tokens of a text for which there are places on the device from the start; each pass goes through those that are known.
LONGEST = 2**20
# Tokens of the longest match that is looked for: GRAM, or up to MOST_GRAM where a caller asks for more.
GRAM, MOST_GRAM = 8, 16


def lookup_of(
    checked: CheckedModel,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
) -> Lookup | None:
    """What runs a call of prompt lookup, `None` if that is left to transformers."""
    proposed, gram = generation_config.prompt_lookup_num_tokens, generation_config.max_matching_ngram_size
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
    if proposed < 1 or checked.most < 2:
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
    fits = min(proposed, checked.most - 1)
    return Lookup(checked, cache, starts, fits, min(max(gram or 0, GRAM), MOST_GRAM), longest, ends_of)


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
    _room: int = 0

    def run(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], streamer: Any
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """As `_assisted_decoding` of transformers."""
        found = self.checked.model._prefill(input_ids, generation_config, model_kwargs, is_first_iteration=True)
        first = found.logits[:, -1].argmax(-1)
        text = self._text_of(input_ids, first)
        known, span = input_ids.shape[1] + 1, self.proposed + 1
        told = Told(span + 2, input_ids)
        goes_on = known < self.longest and not (self.ends is not None and bool(torch.isin(first, self.ends)))
        if streamer is not None:
            streamer.put(first.cpu()[None])
        try:
            if goes_on:
                self._make_room(known)
                told.tell(self._pass(text))
            while goes_on:
                # One pass may have brought all its tokens, and the one after it reads as many again.
                launched = known - 1 + 2 * span <= self._room
                if launched:
                    following = self._pass(text)
                *chosen, kept, ended = told.wait().tolist()
                known += kept
                if streamer is not None:
                    streamer.put(torch.tensor([chosen[:kept]], device="cpu"))
                if ended:
                    break
                if not launched:
                    self._make_room(known)
                    following = self._pass(text)
                told.tell(following)
        finally:
            self._show(known - 1)
        if streamer is not None:
            streamer.end()
        sequences = text.known(known)[None]
        if not generation_config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(sequences=sequences, past_key_values=self.cache)  # type: ignore[arg-type]

    def _text_of(self, input_ids: Tensor, first: Tensor) -> LookupText:
        """The prompt and its first token, where the device continues them."""
        from lte.ops.lookup import LookupText  # this needs triton, which is not everywhere

        ids = torch.cat([input_ids[0].long(), first])
        ends = ids.new_empty(0) if self.ends is None else self.ends.long()
        return LookupText(ids, self.starts, self.proposed, self.gram, self.longest, ends)

    def _pass(self, text: LookupText) -> Tensor:
        """Reads the last token and what is proposed; see `LookupText.keep`.

        After the end of the text nothing stays, so that a pass that began too early does no harm.
        """
        return text.keep(self.checked.logits_of(*text.propose()).argmax(-1))

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
