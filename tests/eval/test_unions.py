"""What `lte.eval.unions` and its oracle count, beside counts that are written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lte
from lte.eval.sparsity import UNION_TOKENS, measure_sparsity
from lte.eval.union_oracle import (
    CHUNK,
    LayerActivity,
    expert_sums,
    largest,
    layer_oracle,
    record_activity,
    regrouped,
    shared_sparsity,
)
from lte.eval.unions import (
    TOKENS,
    UnionSettings,
    count_off_together,
    extremes,
    measure_unions,
    routed_masks,
    union_rows,
)
from tests.tiny_models import EXPERT_SIZE, NEURONS, VOCAB, tiny_dense_model, tiny_sparse_model

N, T, E = 5, 19, 6


def masks_of(layers: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shares = torch.tensor([0.0, 0.05, 0.2, 0.5, 0.9, 1.0])
    return [torch.rand(N, T, E, generator=generator) < shares for _ in range(layers)]


def off(groups: list[list[tuple[int, int]]], mask: Tensor) -> list[float]:
    """Of each expert the share of groups of (row, place) in which no token switches it on."""
    found = mask.tolist()
    return [sum(not any(found[r][t][e] for r, t in group) for group in groups) / len(groups) for e in range(E)]


def test_consecutive_tokens_and_texts_are_counted_one_by_one() -> None:
    masks = masks_of()
    counted = count_off_together(masks, (2, 4, 8, 32), seed=3)
    assert list(counted.off) == [2, 4, 8]
    order = torch.Generator().manual_seed(3)
    places = torch.rand(N, T, generator=order).argsort(1).tolist()
    pieces = torch.randperm(N, generator=order).tolist()
    for n in (2, 4, 8):
        starts = [(r, s) for r in range(N) for s in range(0, T - n + 1, n)]
        groups = {
            "consecutive": [[(r, s + i) for i in range(n)] for r, s in starts],
            "random": [[(r, places[r][s + i]) for i in range(n)] for r, s in starts],
            "texts": [[(pieces[s + i], t) for i in range(n)] for s in range(0, N - n + 1, n) for t in range(T)],
        }
        for name, wanted in groups.items():
            if not wanted:
                assert name not in counted.off[n]
                continue
            assert counted.groups[n][name] == len(wanted)
            for layer, mask in enumerate(masks):
                assert counted.off[n][name][layer].tolist() == pytest.approx(off(wanted, mask))


def test_rows_hold_the_means_and_independence() -> None:
    masks = masks_of()
    counted = count_off_together(masks, (2, 4))
    for row, n in zip(union_rows(counted), (2, 4), strict=True):
        use = [[mask[..., e].double().mean().item() for e in range(E)] for mask in masks]
        by_layer = [sum((1 - f) ** n for f in layer) / E for layer in use]
        assert row["frequencies"]["by_layer"] == pytest.approx(by_layer)
        assert row["frequencies"]["sparsity"] == pytest.approx(sum(by_layer) / 2)
        assert row["uniform"]["by_layer"] == pytest.approx([(1 - sum(layer) / E) ** n for layer in use])
        for name in ("consecutive", "random", "texts"):
            assert row[name]["by_layer"] == pytest.approx(counted.off[n][name].mean(1).tolist())
            assert row[name]["sparsity"] == pytest.approx(counted.off[n][name].mean().item())


def test_random_tokens_have_no_neighbours() -> None:
    # Stretches of 8 tokens that choose alike: neighbours share all, random tokens next to nothing of it.
    mask = (torch.rand(16, 64, 1, 32, generator=torch.Generator().manual_seed(0)) < 0.3).expand(16, 64, 8, 32)
    (row,) = union_rows(count_off_together([mask.flatten(1, 2)], (8,)))
    assert row["consecutive"]["sparsity"] == pytest.approx(0.7, abs=0.02)
    assert row["random"]["sparsity"] == pytest.approx(0.7**8, abs=0.05)
    assert row["texts"]["sparsity"] == pytest.approx(0.7**8, abs=0.02)
    assert row["frequencies"]["sparsity"] == pytest.approx(0.7**8, abs=0.02)


def test_what_rare_experts_explain() -> None:
    masks = masks_of()
    counted = count_off_together(masks, (2,))
    found = extremes(counted, 0.1)
    never, always, rest, alone, independent = 0.0, 0.0, 0.0, [], []
    shares = {"nearly_never": 0, "nearly_always": 0}
    for layer, mask in enumerate(masks):
        for e in range(E):
            use, is_off = mask[..., e].double().mean().item(), counted.off[2]["consecutive"][layer, e].item()
            if use <= 0.1:
                never, shares["nearly_never"] = never + is_off, shares["nearly_never"] + 1
            elif use >= 0.9:
                always, shares["nearly_always"] = always + is_off, shares["nearly_always"] + 1
            else:
                rest, alone, independent = rest + is_off, [*alone, is_off], [*independent, (1 - use) ** 2]
    assert {name: 2 * E * found[name] for name in shares} == pytest.approx(shares)
    (row,) = found["rows"]
    assert row["of_nearly_never"] == pytest.approx(never / (2 * E))
    assert row["of_nearly_always"] == pytest.approx(always / (2 * E))
    assert row["of_others"] == pytest.approx(rest / (2 * E))
    assert row["others"] == pytest.approx(sum(alone) / len(alone))
    assert row["others_frequencies"] == pytest.approx(sum(independent) / len(independent))
    every = extremes(count_off_together([torch.ones(2, 4, 3, dtype=torch.bool)], (2,)), 0.1)
    assert (every["nearly_always"], every["rows"][0]["others"]) == (1.0, None)


def test_compared_models_say_the_same_of_counted_tokens() -> None:
    model = tiny_sparse_model()
    ids = torch.randint(3, VOCAB, (3, 20), generator=torch.Generator().manual_seed(0))
    masks = routed_masks(model, ids)
    keep = torch.ones(3, 20, dtype=torch.bool)
    keep[1, 5] = False
    labels = ids.masked_fill(~keep, -100)
    found = measure_sparsity(model, [{"input_ids": ids, "labels": labels}]).union_sparsity
    for n in UNION_TOKENS:
        chunks = [(r, s) for r in range(3) for s in range(0, 20 - n + 1, n) if keep[r, s : s + n].all()]
        for layer, mask in enumerate(masks):
            shares = [(~mask[r, s : s + n].any(0)).double().mean().item() for r, s in chunks]
            assert found[str(n)][layer] == pytest.approx(sum(shares) / len(shares))
    short = measure_sparsity(model, [{"input_ids": ids[:, :5]}])
    assert list(short.union_sparsity) == ["2", "4"]
    assert lte.eval.sparsity.Measurement.from_dict(short.to_dict()) == short  # type: ignore[attr-defined]
    earlier = {name: value for name, value in short.to_dict().items() if name != "union_sparsity"}
    assert lte.eval.sparsity.Measurement.from_dict(earlier).union_sparsity == {}  # type: ignore[attr-defined]


def test_masks_are_those_of_the_routers(model_type: str) -> None:
    if model_type in ("bert", "roberta", "t5", "t5 gated"):
        pytest.skip("no decoder")
    model = tiny_sparse_model(model_type)
    ids = torch.randint(3, VOCAB, (9, 6), generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    hooks = [
        ffn.router.register_forward_hook(lambda module, args, output: seen.append(output.reshape(6, -1) > 0))
        for ffn in lte.sparse_ffns(model).values()
    ]
    with torch.no_grad():
        for row in ids:
            model(row[None])
    for hook in hooks:
        hook.remove()
    masks = routed_masks(model, ids)
    for layer, mask in enumerate(masks):
        assert torch.equal(mask, torch.stack(seen[layer :: len(masks)]))


def test_the_largest_values_by_hand() -> None:
    values = torch.tensor([[0.1, 0.5, 0.4, 0.0], [0.0, 0.0, 0.9, 0.1], [0.2, 0.3, 0.1, 0.4]])
    found = largest(values, torch.tensor([2, 3, 0]))
    assert found.tolist() == [[False, True, True, False], [False, False, True, True], [False] * 4]


def test_one_choice_for_a_chunk_by_hand() -> None:
    # Two chunks of two tokens, three experts; a token's contributions add up to 1.
    values = torch.tensor([[[0.7, 0.3, 0.0], [0.5, 0.1, 0.4], [0.0, 0.9, 0.1], [0.1, 0.8, 0.1]]])
    # Of the chunks: 1.2, 0.4, 0.4 and 0.1, 1.7, 0.2, of 4 in all.
    assert shared_sparsity(values, 2, 1.7 / 4 - 1e-6) == pytest.approx(5 / 6)
    assert shared_sparsity(values, 2, 2.9 / 4 - 1e-6) == pytest.approx(4 / 6)
    assert shared_sparsity(values, 2, 2.9 / 4 + 1e-6) == pytest.approx(3 / 6)
    assert shared_sparsity(values, 2, 0.0) == 1.0
    # All of them, also where the sum of all comes out below 1.
    assert shared_sparsity(values, 2, 1 + 1e-6) == 0.0
    # Of single tokens: 0.9, 0.8, 0.7, of 4 in all.
    assert shared_sparsity(values, 1, 2.4 / 4 - 1e-6) == pytest.approx(9 / 12)


def test_neurons_that_matter_together_become_experts() -> None:
    generator = torch.Generator().manual_seed(0)
    # Eight sets of eight neurons, spread over the FFN; a stretch of eight tokens uses two of them.
    order = torch.randperm(64, generator=generator)
    sets = torch.rand(40, 4, 8, generator=generator).argsort(-1) < 2
    busy = sets.repeat_interleave(8, 1).repeat_interleave(8, 2)[..., order]
    shares = torch.where(busy, torch.rand(busy.shape, generator=generator), 0.0)
    shares = shares / shares.sum(-1, keepdim=True)
    counts = torch.full((40, 32), 16)
    experts = regrouped(shares, counts, 8, seed=0)
    wanted = {frozenset((order // 8 == each).nonzero().flatten().tolist()) for each in range(8)}
    assert {frozenset(each.tolist()) for each in experts} == wanted
    active = torch.zeros(40, 32, 8, dtype=torch.bool)
    active[..., :2] = True
    found = layer_oracle(LayerActivity(shares, active), seed=0)
    assert found["regrouped"]["kept"] == pytest.approx(1, abs=1e-6)
    assert found["regrouped"]["sparsity"]["8"] == pytest.approx(0.75)
    assert found["regrouped"]["shared"]["8"] >= 0.75
    assert list(found["ideal"]["shared"]) == ["1", "2", "4", "8", "16"]
    assert found["neurons"]["sparsity"]["8"] == pytest.approx(0.75)
    assert found["ideal"]["kept"] < 0.8
    assert found["routers"]["sparsity"] == {"2": 0.75, "4": 0.75, "8": 0.75, "16": 0.75}


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "phi3"])
def test_contributions_are_those_of_the_activations(model_type: str) -> None:
    model = tiny_sparse_model(model_type)
    ids = torch.randint(3, VOCAB, (5, 7), generator=torch.Generator().manual_seed(0))
    (seen,) = record_activity(model, ids, [1])
    assert torch.equal(seen.active, routed_masks(model, ids)[1])
    ffn = list(lte.sparse_ffns(model).values())[1]
    read: list[Tensor] = []
    down = ffn.part(ffn.layout.down)
    ffn.set_mode("dense")
    first = next(iter(lte.sparse_ffns(model).values()))
    assert first.mode == "hard"
    hook = down.register_forward_pre_hook(lambda module, args: read.append(args[0].reshape(5, 7, -1)))
    with torch.no_grad():
        model(ids)
    hook.remove()
    squares = (read[0] * ffn.layout.matrix(down).norm(dim=0)) ** 2
    torch.testing.assert_close(seen.shares, squares / squares.sum(-1, keepdim=True))
    sums = expert_sums(seen.shares, torch.arange(NEURONS).view(-1, EXPERT_SIZE))
    torch.testing.assert_close(sums, seen.shares.unflatten(-1, (-1, EXPERT_SIZE)).sum(-1))


def test_the_whole_measurement() -> None:
    model = tiny_sparse_model()
    ids = torch.randint(3, VOCAB, (6, 16), generator=torch.Generator().manual_seed(0))
    said: list[str] = []
    found = measure_unions(
        model, ids, UnionSettings(pieces=6, length=16, oracle_layers=1, oracle_tokens=64), said.append
    )
    assert [row["tokens"] for row in found["rows"]] == [n for n in TOKENS if n <= 16]
    assert found["sparsity"] == pytest.approx(1 - torch.stack(routed_masks(model, ids)).double().mean().item())
    assert (found["oracle"]["layers"], found["oracle"]["tokens"], found["oracle"]["chunk"]) == ([1], 32, CHUNK)
    assert found["oracle"]["mean"] == found["oracle"]["by_layer"][0]
    assert [each["level"] for each in found["extremes"]] == [0.01, 0.05, 0.1]
    assert len(said) == 3
    said.clear()
    assert measure_unions(model, ids, UnionSettings(oracle_layers=0), said.append)["oracle"] is None
    assert len(said) == 1
    for few, tokens in ((ids, 31), (ids[:1], 64), (ids[:, :7], 64)):
        said.clear()
        assert measure_unions(model, few, UnionSettings(oracle_tokens=tokens), said.append)["oracle"] is None
        assert said[1].startswith("nothing of other experts, which takes two pieces of at least 8 tokens")


def test_what_cannot_be_measured(tmp_path: Path) -> None:
    ids = torch.ones(2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="LTE model"):
        measure_unions(tiny_dense_model(), ids, UnionSettings())
    with pytest.raises(ValueError, match="model must predict the next token from those before it"):
        measure_unions(tiny_sparse_model("bert"), ids, UnionSettings())
    settings: dict[str, Any] = {"pieces": 1}
    with pytest.raises(ValueError, match="pieces must be a whole number from 2, got pieces=1"):
        UnionSettings(**settings)
