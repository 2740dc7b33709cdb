"""The losses on neighbouring tokens against loops over tokens, and the documents that they stay within."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lte.nn.locality import UNION_SHARPNESS, chunk_efficiency_loss, predecessor_loss, union_loss
from lte.nn.losses import efficiency_loss

L, B, T, E = 2, 2, 9, 3
# A document ends inside the first row, and the second row ends with padding.
FOLLOWS = torch.ones(B, T, dtype=torch.bool)
FOLLOWS[:, 0] = FOLLOWS[0, 4] = False
MASK = torch.ones(B, T, dtype=torch.bool)
MASK[1, 7:] = False


def logits(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(L, B, T, E, generator=generator, dtype=torch.float64)).requires_grad_()


def divergence(p: Tensor, q: Tensor) -> Tensor:
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


def predecessor_by_hand(given: Tensor, mask: Tensor | None) -> Tensor:
    scores, values = given.sigmoid(), []
    for row in range(B):
        for t in range(1, T):
            if FOLLOWS[row, t] and (mask is None or (mask[row, t] and mask[row, t - 1])):
                values.append(divergence(scores[:, row, t - 1].detach(), scores[:, row, t]).mean(-1))
    return torch.stack(values).mean(0)


def union_by_hand(given: Tensor, mask: Tensor | None, chunk: int, threshold: float) -> Tensor:
    on, values = torch.sigmoid(UNION_SHARPNESS * (given - threshold)), []
    for row in range(B):
        for start in range(0, T - chunk + 1, chunk):
            places = range(start, start + chunk)
            one_document = all(FOLLOWS[row, t] for t in places[1:])
            if one_document and (mask is None or all(mask[row, t] for t in places)):
                none = torch.ones_like(on[:, 0, 0])
                for t in places:
                    none = none * (1 - on[:, row, t])
                values.append((1 - none).mean(-1))
    return torch.stack(values).mean(0)


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("flat", [False, True])
def test_predecessor_loss_is_the_divergence_of_each_pair_in_a_document(mask: Tensor | None, flat: bool) -> None:
    given = logits()
    found = predecessor_loss(given.flatten(1, 2) if flat else given, FOLLOWS, mask)
    wanted = predecessor_by_hand(given, mask)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), given), torch.autograd.grad(wanted.sum(), given))


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize(("chunk", "threshold"), [(2, 0.0), (3, 0.4)])
def test_union_loss_is_that_of_whole_chunks_of_one_document(mask: Tensor | None, chunk: int, threshold: float) -> None:
    given = logits()
    found = union_loss(given, FOLLOWS, mask, chunk=chunk, threshold_logit=threshold)
    wanted = union_by_hand(given, mask, chunk, threshold)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), given), torch.autograd.grad(wanted.sum(), given))


@pytest.mark.parametrize("mask", [None, MASK])
def test_the_price_of_a_chunk_is_that_of_its_largest_score(mask: Tensor | None) -> None:
    given, values = logits(), []
    for row in range(B):
        for start in range(0, T - 2, 3):
            places = range(start, start + 3)
            if all(FOLLOWS[row, t] for t in places[1:]) and (mask is None or all(mask[row, t] for t in places)):
                mean = sum((UNION_SHARPNESS * given[:, row, t]).exp() for t in places) / 3
                values.append((mean.log() / UNION_SHARPNESS).sigmoid().square().mean(-1))
    wanted = torch.stack(values).mean(0)
    found = chunk_efficiency_loss(given, FOLLOWS, mask, chunk=3)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), given), torch.autograd.grad(wanted.sum(), given))
    # Tokens that choose alike cost what each of them costs alone, also where all of them are on.
    for logit in (3.0, -1.0):
        alike = torch.full((L, B, T, E), logit, requires_grad=True)
        loss = chunk_efficiency_loss(alike, FOLLOWS, chunk=3)
        torch.testing.assert_close(loss, efficiency_loss(alike.sigmoid(), layers=True))
        assert torch.autograd.grad(loss.sum(), alike)[0][:, 1].lt(0).logical_not().all()
        assert torch.autograd.grad(chunk_efficiency_loss(alike, FOLLOWS, chunk=3).sum(), alike)[0][:, 1].all()


def test_equal_neighbours_and_experts_that_are_always_on_cost_and_push_nothing() -> None:
    same = torch.randn(1, 1, 1, E, dtype=torch.float64).expand(L, B, T, E).clone().requires_grad_()
    loss = predecessor_loss(same, FOLLOWS)
    assert loss.abs().max() < 1e-12
    assert torch.autograd.grad(loss.sum(), same)[0].abs().max() < 1e-12
    pinned = torch.full((1, B, T, E), 1000.0, requires_grad=True)
    total = predecessor_loss(pinned, FOLLOWS).sum() + union_loss(pinned, FOLLOWS, chunk=3).sum()
    assert total.item() == 1.0
    assert not torch.autograd.grad(total, pinned)[0].any()


def test_nothing_in_the_next_document_matters() -> None:
    given = logits()
    changed = given.detach().clone()
    # Across the border nothing is compared: only what is inside the first document may count for its tokens.
    alone = predecessor_loss(given[:, :1, :4], FOLLOWS[:1, :4])
    both = FOLLOWS[:1].clone()
    changed[:, :, 4:] = changed[:, :, 3:4]
    torch.testing.assert_close(7 / 3 * predecessor_loss(changed[:, :1], both), alone.detach())


def test_rows_shorter_than_a_chunk_have_no_union() -> None:
    for loss in (union_loss(logits(), FOLLOWS, chunk=T + 1), chunk_efficiency_loss(logits(), FOLLOWS, chunk=T + 1)):
        assert loss.tolist() == [0.0] * L
        assert loss.requires_grad
