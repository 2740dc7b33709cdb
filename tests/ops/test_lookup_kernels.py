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


def proposal_of(text: list[int], proposed: int, gram: int) -> list[int]:
    """What followed the longest match, twice as much for each further token: a long one's first place, or the last."""
    for length in range(min(gram, len(text) - 1), 0, -1):
        ends = range(length, len(text))
        for end in ends if length >= 4 else reversed(ends):
            if text[end - length : end] == text[-length:]:
                return text[end : end + min(proposed, 2 ** (length - 1))]
    return []


@pytest.mark.parametrize("proposed", [1, 4, 7])
def test_random_passes(proposed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of the choices are what was proposed; the text ends by its length, or by one of two tokens."""
    monkeypatch.setattr(lookup, "BLOCK", 8)  # several blocks of a short text
    sizes = set[int]().union(*(check_passes(seed, proposed) for seed in range(8)))
    assert {1, proposed + 1} <= sizes


def check_passes(seed: int, proposed: int) -> set[int]:
    """Continues a random text to its end; how many tokens the passes had."""
    chance = random.Random(seed)
    gram, few = chance.choice([1, 2, 4, 8]), chance.choice([1, 3, 6])
    known = [chance.randrange(few) for _ in range(chance.randint(2, 30))]
    longest, start = len(known) + chance.randint(5, 40), 7
    ends = [50, 51] if seed % 2 else []
    text = LookupText(numbers(known), numbers([start]), proposed, gram, longest, numbers(ends))
    ended, sizes = False, set[int]()
    while not ended:
        expected = proposal_of(known, proposed, gram)
        tokens, positions, starts = (each.tolist() for each in text.propose())
        count = len(expected) + 1
        sizes.add(count)
        last = len(known) - 1
        assert tokens[:count] == [known[-1], *expected]
        assert positions == [*range(last, last + proposed + 1)]
        assert starts == [start] * count + [position + 1 for position in positions[count:]]
        choices = [chance.randrange(few) for _ in range(proposed + 1)]
        choices[: len(expected)] = expected
        if chance.random() < 0.5:
            choices[chance.randrange(proposed + 1)] = chance.choice([*ends, few + 1])
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
    return sizes


def test_the_kernels_compile_for_both_architectures(tmp_path: Path) -> None:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    command = [sys.executable, "-m", "tests.ops.compile_lookup_kernels"]
    run = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert {(row["kernel"], row["arch"]) for row in rows} == {(name, arch) for name in NAMES for arch in (80, 90)}
    assert {row["local"] for row in rows} == {0}
