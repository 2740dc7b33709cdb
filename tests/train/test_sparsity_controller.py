"""The feedback loops, against simple models of what they control."""

import pytest
import torch

from lte.train.sparsity_controller import EtaController, SparsityRamp, target_logit


def test_the_ramp_rises_to_the_target_and_stays():
    ramp = SparsityRamp(0.5, ramp_steps=10)
    assert [ramp.at(step) for step in (0, 5, 10, 50)] == [0.0, 0.25, 0.5, 0.5]


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
def test_eta_finds_the_target_whatever_the_scale_of_the_loss(scale):
    # The sparsity drifts up with eta and falls back by itself, as the task loss pulls experts on again.
    controller, sparsity = EtaController(), 0.0
    for _ in range(4000):
        eta = controller.update(0.5, sparsity)
        sparsity += 0.01 * (eta / scale / (1 + eta / scale) - sparsity)
    assert sparsity == pytest.approx(0.5, abs=0.01)


def test_the_target_logit_is_the_quantile_of_the_counted_tokens():
    logits = [torch.randn(4, 64, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    mask = torch.ones(4, 64, dtype=torch.bool)
    mask[:, 40:] = False
    expected = torch.stack(logits)[:, mask].flatten().quantile(0.3)
    for layer in logits:
        layer[:, 40:] = 1e6
    assert target_logit(logits, [mask] * len(logits), 0.3).item() == pytest.approx(expected.item(), abs=1e-5)
