"""Training through other people's machinery: activation checkpointing, torch.compile, and LoRA adapters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

import lte
from lte.data.rows import LmCollator
from lte.hf.families import family_of
from lte.nn.losses import efficiency_loss
from lte.train.router_init import fit_routers_
from tests.tiny_models import PAD, logits_of, row_of, tiny_dense_model, tiny_sparse_model, zero_dropout_
from tests.train.toy import toy_rows


def trainable_model(model_type: str, mode: Any = "soft") -> Any:
    model = zero_dropout_(tiny_sparse_model(model_type).train())
    for ffn in lte.sparse_ffns(model).values():
        ffn.set_mode(mode)
        ffn.record_logits = True
    return model


def loss_and_gradients(model: Any, tokens: Tensor, run: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Task loss plus a loss on the recorded router logits, and what they give every parameter."""
    run = model if run is None else run
    loss = run(input_ids=tokens, labels=tokens).loss
    for ffn in lte.sparse_ffns(model).values():
        loss = loss + efficiency_loss(ffn.logits.sigmoid())  # type: ignore[union-attr]
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return loss.detach(), gradients


def assert_equal_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], measure: Any) -> None:
    assert actual.keys() == expected.keys()
    errors = {name: measure(actual[name], expected[name]) for name in expected}
    assert max(errors.values()) <= 1e-5, errors


@pytest.mark.parametrize("mode", ["soft", "straight_through"])
def test_activation_checkpointing_gives_the_same_gradients(
    model_type: str, mode: Any, tokens: Tensor, relative_rms
) -> None:
    model = trainable_model(model_type, mode)
    loss, gradients = loss_and_gradients(model, tokens)
    assert all(gradient.any() for gradient in gradients.values())
    calls = []
    ffn = next(iter(lte.sparse_ffns(model).values()))
    ffn.register_forward_pre_hook(lambda *args: calls.append(None))
    model.gradient_checkpointing_enable()
    checkpointed_loss, checkpointed = loss_and_gradients(model, tokens)
    assert len(calls) == 2, "the layer must have been run once more in the backward pass"
    torch.testing.assert_close(checkpointed_loss, loss)
    assert_equal_gradients(checkpointed, gradients, relative_rms)


# The graph of a gated, of a fused and of a spread FFN; the other families share them.
@pytest.mark.parametrize("model_type", ["llama", "phi3", "bert"])
@pytest.mark.parametrize("mode", ["soft", "straight_through"])
def test_compiled_step_equals_the_eager_one(model_type: str, mode: Any, tokens: Tensor, relative_rms) -> None:
    model = trainable_model(model_type, mode)
    loss, gradients = loss_and_gradients(model, tokens)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled_loss, compiled_gradients = loss_and_gradients(model, tokens, compiled)
    torch.testing.assert_close(compiled_loss, loss)
    assert_equal_gradients(compiled_gradients, gradients, relative_rms)


def lora_model(model: Any) -> Any:
    layout = family_of(model.config).layout
    config = peft.LoraConfig(r=2, target_modules=["o_proj", *layout.projections], init_lora_weights=False)
    return peft.get_peft_model(model, config)


def test_lora_trains_adapters_alone(model_type: str, tokens: Tensor) -> None:
    base = trainable_model(model_type)
    projections = row_of(model_type).layout.projections
    model = lora_model(base)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    assert all(any(f".{projection}.lora_A" in name for name in changed) for projection in projections)


def test_lora_adapters_save_load_and_merge(model_type: str, tokens: Tensor, relative_rms, tmp_path: Path) -> None:
    base = tiny_sparse_model(model_type)
    model = lora_model(copy.deepcopy(base)).eval()
    with torch.no_grad():
        plain, expected = logits_of(base, tokens), logits_of(model, tokens)
        assert relative_rms(expected, plain) > 1e-2
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        assert torch.equal(logits_of(loaded, tokens), expected)
        merged = loaded.merge_and_unload()
        assert lte.sparse_ffns(merged)
        assert relative_rms(logits_of(merged, tokens), expected) <= 1e-5
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits_of(again, tokens), logits_of(merged, tokens))


def test_routers_can_be_trained_beside_adapters(tokens: Tensor, tmp_path: Path) -> None:
    base = trainable_model("llama")
    config = peft.LoraConfig(r=2, target_modules=["down_proj"], modules_to_save=["router"])
    model = peft.get_peft_model(copy.deepcopy(base), config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert repr(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        assert torch.equal(logits_of(loaded.eval(), tokens), logits_of(model.eval(), tokens))
    moved = [name for name, p in model.named_parameters() if "router.modules_to_save" in name]
    assert moved, "the routers must be among the trained modules"


def test_a_stock_training_says_once_what_drifts_and_calibration_puts_it_back(tmp_path):
    rows = toy_rows(256)
    batches = [LmCollator(PAD)([rows[i] for i in range(s, s + 32)]) for s in range(0, 256, 32)]
    model = lte.sparsify_(tiny_dense_model(), lte.LteConfig(expert_size=8, grouping="random", target_sparsity=0.5))
    fit_routers_(model, batches)
    lte.calibrate_(model, batches)
    start = lte.measure_sparsity(model, batches).sparsity
    arguments = {"max_steps": 80, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "no"}
    stock = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, **arguments)
    with pytest.warns(UserWarning, match="without lte.LteTrainer: its routers get no gradient") as caught:
        Trainer(model, stock, train_dataset=rows, data_collator=LmCollator(PAD)).train()
    assert len([each for each in caught if "LteTrainer" in str(each.message)]) == 1
    drifted = lte.measure_sparsity(model, batches).sparsity
    assert abs(drifted - start) > 0.02
    lte.calibrate_(model, batches)
    assert lte.measure_sparsity(model, batches).sparsity == pytest.approx(0.5, abs=0.005)


def test_our_own_training_and_evaluation_warn_of_nothing(tmp_path, recwarn):
    model = lte.sparsify_(tiny_dense_model(), lte.LteConfig(expert_size=8, grouping="random"))
    settings = {"max_steps": 4, "report_to": "none", "use_cpu": True, "save_strategy": "no"}
    args = lte.LteTrainingArguments(str(tmp_path), **settings)
    lte.LteTrainer(model, args, train_dataset=toy_rows(), data_collator=LmCollator(PAD)).train()
    lte.measure_sparsity(model, [LmCollator(PAD)([toy_rows()[0]])])
    assert not [each for each in recwarn if "LteTrainer" in str(each.message)]
