"""Routing terms of stacked layers against those of each layer by itself."""

from __future__ import annotations

import pytest
import torch

from lte.nn.losses import active_fraction, efficiency_loss, near_threshold_fraction, separability_loss
from lte.train.objective import routing_terms, stack_layers

LONG = torch.tensor([[True] * 5, [True, True, False, False, False]])
SHORT = torch.tensor([[True] * 3, [True, False, False]])


def test_neighbours_that_share_shape_and_mask_are_one_stack() -> None:
    logits = [torch.rand(2, 5, 4) for _ in range(3)] + [torch.rand(2, 3, 4) for _ in range(2)]
    stacked, masks = stack_layers(logits, [LONG, LONG, LONG.clone(), SHORT, SHORT])
    assert [tuple(stack.shape) for stack in stacked] == [(2, 2, 5, 4), (1, 2, 5, 4), (2, 2, 3, 4)]
    assert torch.equal(torch.cat([stack.flatten() for stack in stacked]), torch.cat([x.flatten() for x in logits]))
    assert masks[0] is LONG
    assert masks[2] is SHORT
    stacked, masks = stack_layers(logits[:2], [None, None])
    assert (len(stacked), masks) == (1, [None])


@pytest.mark.parametrize("flat", [False, True])
def test_terms_are_those_of_each_layer(flat: bool) -> None:
    shapes, masks = [(2, 5, 4)] * 2 + [(2, 3, 8)], [LONG, LONG, SHORT]
    logits = [torch.randn(shape, requires_grad=True) for shape in shapes]
    # Some blocks flatten [B, T] before their FFN.
    given = [layer.flatten(0, 1) if flat else layer for layer in logits]
    terms = routing_terms(*stack_layers(given, masks), 0.3, 0.01)
    tau = torch.tensor(0.3).sigmoid().item()
    pairs = [(layer.sigmoid(), mask) for layer, mask in zip(logits, masks, strict=True)]
    expected = {
        "efficiency": [efficiency_loss(*pair) for pair in pairs],
        "separability": [separability_loss(*pair, threshold=tau, guard=0.01) for pair in pairs],
        "near_threshold": [near_threshold_fraction(*pair, threshold=tau) for pair in pairs],
        "active_fraction": [
            active_fraction(layer, mask, threshold_logit=0.3) for layer, mask in zip(logits, masks, strict=True)
        ],
    }
    for name, by_layer in expected.items():
        torch.testing.assert_close(terms[name], torch.stack(by_layer).mean())
    torch.testing.assert_close(terms["active_by_layer"], torch.stack(expected["active_fraction"]))
    assert not terms["active_fraction"].requires_grad
    found = torch.autograd.grad(terms["efficiency"] + terms["separability"], logits)
    wanted = torch.autograd.grad(
        torch.stack(expected["efficiency"]).mean() + torch.stack(expected["separability"]).mean(), logits
    )
    torch.testing.assert_close(found, wanted)
