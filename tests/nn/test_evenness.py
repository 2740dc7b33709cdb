"""The loss on even rows against a loop over rows, its direction, and the rows and tokens that do not count."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lte.nn.evenness import EVEN_SHARPNESS, even_loss, row_active_shares

L, B, T, E = 2, 3, 7, 4
# The second row ends with padding.
MASK = torch.ones(B, T, dtype=torch.bool)
MASK[1, 3:] = False


def logits(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(L, B, T, E, generator=generator, dtype=torch.float64).requires_grad_()


def loss_of(given: Tensor, mask: Tensor | None = None, target: float = 0.4, threshold: float = 0.0) -> Tensor:
    return even_loss(*row_active_shares(given, mask, threshold_logit=threshold), target)


def by_hand(given: Tensor, mask: Tensor | None, target: float, threshold: float) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient: that of the mean of the sigmoids of the row."""
    values, gradient = [], torch.zeros_like(given)
    rows = [row for row in range(B) if mask is None or mask[row].any()]
    for row in rows:
        tokens = [t for t in range(T) if mask is None or mask[row, t]]
        distance = given[:, row, tokens].detach() - threshold
        share = (distance > 0).double().mean()
        values.append(((share - target) / target) ** 2)
        soft = torch.sigmoid(EVEN_SHARPNESS * distance)
        slope = EVEN_SHARPNESS * soft * (1 - soft) / soft.numel()
        gradient[:, row, tokens] = 2 * (share - target) / target**2 * slope / len(rows)
    return torch.stack(values).mean(), gradient


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize(("target", "threshold"), [(0.5, 0.0), (0.2, 0.7)])
def test_the_loss_is_the_mean_over_rows_of_the_squared_relative_distance(
    mask: Tensor | None, target: float, threshold: float
) -> None:
    given = logits()
    found = loss_of(given, mask, target, threshold)
    value, gradient = by_hand(given, mask, target, threshold)
    torch.testing.assert_close(found, value)
    torch.testing.assert_close(torch.autograd.grad(found, given)[0], gradient)


def test_the_shares_are_counts_of_hard_mode() -> None:
    given = logits().float()
    shares, counted = row_active_shares(given, MASK, threshold_logit=0.3)
    for row in range(B):
        kept = given[:, row, MASK[row]] > 0.3
        assert torch.equal(shares[:, row], kept.float().mean(-1).mean(-1))
        assert counted[:, row].all()


def test_rows_above_the_target_get_fewer_experts_and_rows_below_get_more() -> None:
    given = logits().detach()
    given[:, 0] += 0.5
    given[:, 1] -= 0.5
    # Exactly at the target: half of the experts of each token.
    given[:, 2, :, :2], given[:, 2, :, 2:] = 0.3, -0.3
    given.requires_grad_()
    gradient = torch.autograd.grad(loss_of(given, target=0.5), given)[0]
    assert (gradient[:, 0] > 0).all()
    assert (gradient[:, 1] < 0).all()
    assert not gradient[:, 2].any()


def test_one_row_is_held_at_the_target() -> None:
    given = torch.full((1, 1, T, E), 0.2, requires_grad=True)
    loss = loss_of(given, target=0.5)
    assert loss.item() == 1.0
    assert (torch.autograd.grad(loss, given)[0] > 0).all()


def test_masked_tokens_and_empty_rows_neither_count_nor_move() -> None:
    given, mask = logits(), MASK.clone()
    mask[2] = False
    loss = loss_of(given, mask)
    torch.testing.assert_close(loss, loss_of(given[:, :2], MASK[:2]))
    gradient = torch.autograd.grad(loss, given)[0]
    assert not gradient[:, ~mask].any()
    assert gradient[:, mask].any(-1).all()
    nothing = loss_of(given, torch.zeros_like(MASK))
    assert nothing.item() == 0.0
    assert not torch.autograd.grad(nothing, given)[0].any()


def test_a_row_counts_by_the_layers_in_which_it_has_tokens() -> None:
    """Encoder and decoder have masks of their own, as stacks."""
    encoder, decoder, mask = logits(0), logits(1)[:1], MASK.clone()
    mask[0] = False
    found = [row_active_shares(encoder, MASK), row_active_shares(decoder, mask)]
    shares, counted = (torch.cat(values) for values in zip(*found, strict=True))
    by_row = [shares[:2, 0].mean(), shares[:, 1].mean(), shares[:, 2].mean()]
    wanted = torch.stack([((share - 0.5) / 0.5) ** 2 for share in by_row]).mean()
    torch.testing.assert_close(even_loss(shares, counted, 0.5), wanted)


def test_experts_that_are_always_on_count_and_are_not_pushed() -> None:
    given = torch.full((1, 2, T, E), -0.1)
    given[..., 0] = 1000.0
    given.requires_grad_()
    shares, _ = row_active_shares(given)
    assert shares.tolist() == [[0.25, 0.25]]
    gradient = torch.autograd.grad(even_loss(shares, torch.ones(1, 2, dtype=torch.bool), 0.5), given)[0]
    assert not gradient[..., 0].any()
    assert (gradient[..., 1:] < 0).all()


def test_rows_that_are_flattened_need_the_mask() -> None:
    given = logits()
    torch.testing.assert_close(loss_of(given.flatten(1, 2), MASK), loss_of(given, MASK))
    with pytest.raises(ValueError, match=r"token_mask must be given .* got logits of shape \(2, 21, 4\)"):
        loss_of(given.flatten(1, 2))
