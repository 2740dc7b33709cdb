"""Training routers that read the mean of the tokens before."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import lte
from tests.tiny_models import EXPERT_SIZE, tiny_dense_model
from tests.train.test_added_losses import rows_with_documents, train


def start(**overrides: Any) -> Any:
    config = lte.LteConfig(expert_size=EXPERT_SIZE, grouping="random", router_context=4, always_on=0.25)
    text = [{"input_ids": torch.arange(3, 67).view(2, 32)}]
    return lte.sparsify_(tiny_dense_model(**overrides), config, calibration=text)


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"compile_layers": True}])
def test_all_parts_of_routers_train(tmp_path: Path, options: dict[str, Any]) -> None:
    found = []
    for number, settings in enumerate(({}, options)):
        model = start()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trainer, _ = train(
            tmp_path / str(number), model, rows_with_documents(8), max_steps=6, router_learning_rate=1e-2, **settings
        )
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert {name for name in before if "router" in name} <= changed
        for ffn in lte.sparse_ffns(model).values():
            assert not ffn.router.context_weight[: ffn.router.always_on].any()
        found.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_one_compilation_serves_all_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter, compile_, frames = CompileCounter(), torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compile_(*args, **{**kwargs, "backend": counter}))
    for layers in (2, 4):
        torch.compiler.reset()
        counter.clear()
        settings = {"max_steps": 2, "router_fit_tokens": 0, "compile_layers": True}
        train(tmp_path / str(layers), start(num_hidden_layers=layers), rows_with_documents(8), **settings)
        frames.append(counter.frame_count)
    assert frames[0] == frames[1] > 0
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:training this LTE model without")
def test_what_is_computed_anew_is_of_its_own_pass_in_any_thread() -> None:
    gradients = []
    for recomputes in (False, True):
        model = start()
        model.train()
        with torch.no_grad():
            for ffn in lte.sparse_ffns(model).values():
                ffn.set_mode("soft")
                ffn.router.context_weight.normal_(generator=torch.Generator().manual_seed(0))
        if recomputes:
            model.gradient_checkpointing_enable()
        ids = torch.arange(3, 35).view(2, 16)
        # Two passes, of other lengths and other documents, before the first goes back.
        packed = torch.cat([torch.arange(5), torch.arange(11)])[None].expand(2, -1)
        losses = [
            model(ids, position_ids=packed, use_cache=False).logits.square().mean(),
            model(ids[:, :9], use_cache=False).logits.square().mean(),
        ]
        # GPUs go back in a thread of their own.
        going = threading.Thread(target=sum(losses).backward)
        going.start()
        going.join()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert any("context_weight" in name for name in gradients[0])
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
