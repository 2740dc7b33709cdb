"""The text of prompt lookup against plain Python; `tests.hf.test_lookup` has it in whole answers."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lte.ops import lookup
from lte.ops.lookup import LookupText
from tests.ops.compile_lookup_kernels import NAMES
from tests.ops.conftest import DEVICE

ROOT = Path(__file__).parents[2]


def numbers(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


def match_of(text: list[int], gram: int) -> tuple[int, int]:
    """The length of the longest match of the last tokens, and where it ends: a long one's first place, or the last."""
    for length in range(min(gram, len(text) - 1), 0, -1):
        ends = range(length, len(text))
        for end in ends if length >= 4 else reversed(ends):
            if text[end - length : end] == text[-length:]:
                return length, end
    return 0, len(text)


class Trusting:
    """What prompt lookup proposes, in plain Python: less or nothing while matches of a length were mostly wrong."""

    def __init__(self) -> None:
        self.trust, self.last = [0, *lookup.TRUST], (0, -1)

    def proposal_of(self, text: list[int], proposed: int, gram: int) -> list[int]:
        """What followed the longest match."""
        length, end = match_of(text, gram)
        kind = min(length, 4)
        self.last = kind, text[end] if length else -1
        count = min(proposed, [0, 1, 1, 3, proposed][kind])
        return text[end : end + count] if self.trust[kind] >= 0.3 * 4096 else []

    def note(self, token: int) -> None:
        """The token that the model wrote next."""
        kind, followed = self.last
        if kind:
            self.trust[kind] = (7 * self.trust[kind] + 4096 * (token == followed)) // 8


@pytest.mark.parametrize("proposed", [1, 4, 7])
def test_random_passes(proposed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of the choices are what was proposed; the text ends by its length, or by one of two tokens."""
    monkeypatch.setattr(lookup, "BLOCK", 8)  # several blocks of a short text
    monkeypatch.setattr(lookup, "TRUST", (1300,) * 4)  # a single wrong match is one too many
    seen = set[tuple[int, int]]().union(*(check_passes(seed, proposed) for seed in range(16)))
    assert {(0, 0), (1, 0), (1, 1), (3, min(proposed, 3)), (4, proposed)} <= seen
    assert {(2, 0), (3, 0), (4, 0)} & seen


def check_passes(seed: int, proposed: int) -> set[tuple[int, int]]:
    """Continues a random text to its end; of each pass the length of the match, 4 at most, and the tokens proposed."""
    chance = random.Random(seed)
    gram, few = chance.choice([1, 2, 3, 8, 8]), chance.choice([1, 3, 6])
    known = [chance.randrange(few) for _ in range(chance.randint(2, 30))]
    longest, start = len(known) + chance.randint(5, 40), 7
    ends = [50, 51] if seed % 2 else []
    text = LookupText(numbers(known), numbers([start]), proposed, gram, longest, numbers(ends))
    ended, seen, plain = False, set[tuple[int, int]](), Trusting()
    while not ended:
        expected = plain.proposal_of(known, proposed, gram)
        tokens, positions, starts = (each.tolist() for each in text.propose())
        count = len(expected) + 1
        seen.add((plain.last[0], len(expected)))
        last = len(known) - 1
        assert tokens[:count] == [known[-1], *expected]
        assert positions == [*range(last, last + proposed + 1)]
        assert starts == [start] * count + [position + 1 for position in positions[count:]]
        choices = [chance.randrange(few) for _ in range(proposed + 1)]
        choices[: len(expected)] = expected
        if chance.random() < 0.5:
            choices[chance.choice([0, chance.randrange(proposed + 1)])] = chance.choice([*ends, few + 1])
        plain.note(choices[0])
        kept = next((row for row in range(count) if choices[row : row + 1] != expected[row : row + 1]), count - 1) + 1
        end = next((row for row in range(proposed + 1) if choices[row] in ends), proposed + 1)
        ended = end < kept
        kept = min(kept, end + 1, longest - len(known))
        known += choices[:kept]
        ended |= len(known) >= longest
        message = text.keep(numbers(choices)).tolist()
        assert message == [*choices, kept, ended]
        assert text.known(len(known)).tolist() == known
    # A pass that began before the end was known.
    text.propose()
    assert text.keep(numbers([0] * (proposed + 1)))[-2].item() == 0
    assert text.known(len(known)).tolist() == known
    return seen


def test_the_kernels_compile_for_both_architectures(tmp_path: Path) -> None:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    command = [sys.executable, "-m", "tests.ops.compile_lookup_kernels"]
    run = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert {(row["kernel"], row["arch"]) for row in rows} == {(name, arch) for name in NAMES for arch in (80, 90)}
    assert {row["local"] for row in rows} == {0}
