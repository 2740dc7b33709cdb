"""The feedback loops, against simple models of what they control."""

import pytest
import torch

from lte.train.config import TrainConfig, stages_of
from lte.train.schedule import Schedule
from lte.train.sparsity_controller import EtaController, target_logit


def schedule(recipe, **settings):
    given = {"max_steps": 40, "stage1_steps": 20, "target_sparsity": 0.5, "ramp_ratio": 0.5, "warmup": lambda n: n // 5}
    return Schedule(stages_of(TrainConfig(recipe=recipe)), **{**given, **settings})


def test_the_target_rises_to_its_value_and_stays():
    assert [schedule("straight_through").target_at(step) for step in (0, 5, 10, 20, 39)] == [0, 0.25, 0.5, 0.5, 0.5]
    assert schedule("straight_through", stage1_steps=0).target_at(0) == 0.5


def test_each_stage_warms_up_and_routers_rest_where_they_are_frozen():
    ours, paper = schedule("straight_through", stage2_rate=0.5), schedule("paper")
    assert [ours.learning_rate(step) for step in (0, 2, 4, 19)] == [0, 0.5, 1, 1]
    assert [ours.learning_rate(step) for step in (20, 24, 32, 40)] == [0, 0.5, 0.25, 0]
    assert [paper.learning_rate(step) for step in (4, 12, 20, 24)] == [1, 0.5, 0, 1]
    assert [paper.learning_rate(step, routers=True) for step in (4, 24)] == [1, 0]
    assert [ours.stage_at(step).number for step in (0, 19, 20, 40)] == [1, 1, 2, 2]
    assert [step for step in range(41) if ours.starts_stage2(step)] == [20]


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
