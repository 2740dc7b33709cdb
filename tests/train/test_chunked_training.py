"""Training on a loss over chunks of tokens ends as training on all logits does; which models have one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

import lte
from lte.data.rows import LmCollator, TokenRows
from lte.hf.language_head import language_head, splits_head
from lte.train.trainer import LteTrainer
from lte.train.two_stage import CHECKPOINTING
from tests.tiny_models import HIDDEN, MODEL_TYPES, PAD, VOCAB, is_causal, tiny_dense_model, zero_dropout_
from tests.train.toy import toy_rows, trainer_of

_WALKS = toy_rows(16, 16).input_ids
# Passes of one step have different numbers of labels.
ROWS = TokenRows(_WALKS, [np.where(np.arange(16) < 9 * (i % 3 == 0), -100, row) for i, row in enumerate(_WALKS)])
CAUSAL = [model_type for model_type in MODEL_TYPES if is_causal(model_type)]


class Widest(TrainerCallback):
    """How many tokens the heads of models made logits of at once, in training steps."""

    def __init__(self, *models: Any):
        self.models, self.tokens, self.handles = models, [], []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.handles = [
            model.get_output_embeddings().register_forward_hook(
                lambda module, args, output: self.tokens.append(output[..., 0].numel())
            )
            for model in self.models
        ]

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        for handle in self.handles:
            handle.remove()


def trained(folder: Path, tokens: int, teacher: Any = None, **options: Any) -> LteTrainer:
    extra = {} if teacher is None else {"teacher": teacher}
    trainer = trainer_of(folder, ROWS, **extra, save_strategy="no", loss_chunk_tokens=tokens, **options)
    trainer.train()
    return trainer


def steps_of(trainer: LteTrainer) -> Iterator[dict[str, float]]:
    return (entry for entry in trainer.state.log_history if "task_loss" in entry)


OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "checkpointing": {CHECKPOINTING: True},
    "frozen head": {"trainable": "ffn"},
    "compiled": {"compile_layers": True},
    "compiled by Trainer": {"torch_compile": True, "torch_compile_backend": "eager"},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("weight", [None, 0.6, 1.0])
def test_training_ends_as_on_all_logits(
    tmp_path: Path, name: str, weight: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = OPTIONS[name]
    if (
        name == "checkpointing"
        and "activation_checkpointing" not in transformers.TrainingArguments.__dataclass_fields__
    ):
        options = {"gradient_checkpointing": True}
    if name == "compiled":
        compile_ = torch.compile
        monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compile_(*args, **{**kwargs, "backend": "eager"}))
    teacher = None if weight is None else tiny_dense_model()
    options = {**options, **({} if weight is None else {"distillation_weight": weight})}
    whole, chunked = (trained(tmp_path / str(tokens), tokens, teacher, **options) for tokens in (0, 8))
    for one, other in zip(steps_of(whole), steps_of(chunked), strict=True):
        assert ("distillation_loss" in one) == ("distillation_loss" in other)
        for term in ("loss", "task_loss", "distillation_loss", "grad_norm"):
            assert one.get(term, 0) == pytest.approx(other.get(term, 0), rel=1e-3, abs=5e-5)
    for one, other in zip(whole.model.parameters(), chunked.model.parameters(), strict=True):
        assert (one - other).norm() <= 2e-3 * one.norm()


@pytest.mark.parametrize("distils", [False, True])
def test_the_heads_make_logits_of_one_token_of_each_row(tmp_path: Path, distils: bool) -> None:
    teacher = tiny_dense_model() if distils else None
    trainer = trainer_of(tmp_path, ROWS, **({"teacher": teacher} if distils else {}), save_strategy="no")
    widest = Widest(*([trainer.model, teacher] if distils else [trainer.model]))
    trainer.add_callback(widest)
    trainer.train()
    assert set(widest.tokens) == {4}
    assert len(widest.tokens) == 6 * (1 + distils)
    # After the training the model is as it was.
    assert not trainer.model.base_model._forward_hooks
    assert trainer.compute_loss_func is None or distils


class FirstGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not hasattr(self, "found"):
            self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("model_type", CAUSAL)
@pytest.mark.parametrize("tied", [False, True])
def test_every_family_has_the_gradients_of_all_logits(tmp_path: Path, model_type: str, tied: bool) -> None:
    caps = {"final_logit_softcapping": 2.0} if model_type.startswith("gemma") else {}
    teacher = zero_dropout_(tiny_dense_model(model_type, tie_word_embeddings=tied, **caps))
    found = []
    for tokens in (0, 8):
        model = zero_dropout_(tiny_dense_model(model_type, tie_word_embeddings=tied, **caps))
        lte.sparsify_(model, lte.LteConfig(expert_size=8, grouping="contiguous"))
        seen = FirstGradients()
        options = {"max_steps": 1, "per_device_train_batch_size": 4, "report_to": "none", "use_cpu": True}
        tokens_of = {"router_fit_tokens": 0, "calibration_tokens": 0, "loss_chunk_tokens": tokens}
        trainer = LteTrainer(
            model,
            lte.LteTrainingArguments(
                str(tmp_path / str(tokens)),
                save_strategy="no",
                max_grad_norm=0.0,
                logging_steps=1,
                distillation_weight=0.5,
                **options,
                **tokens_of,
            ),
            train_dataset=ROWS,
            data_collator=LmCollator(PAD),
            teacher=teacher,
            callbacks=[seen],
        )
        trainer.train()
        found.append((trainer.state.log_history[0]["loss"], seen.found))
    (loss, gradients), (chunked_loss, chunked_gradients) = found
    assert chunked_loss == pytest.approx(loss, rel=1e-5)
    assert gradients.keys() == chunked_gradients.keys()
    for name, gradient in gradients.items():
        assert (chunked_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-8, name


@pytest.mark.parametrize("name", ["Granite", "Cohere"])
def test_heads_that_scale_are_split(name: str) -> None:
    scales = {"logits_scaling": 3.0} if name == "Granite" else {"logit_scale": 0.3}
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=PAD,
        **scales,
    )
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    ids = torch.arange(3, 15)[None]
    assert splits_head(model, {"input_ids": ids})
    head = language_head(model)
    assert head is not None
    hidden = model.base_model(ids).last_hidden_state
    torch.testing.assert_close(head.logits(hidden), model(ids).logits)
    # What the config does not tell is found out.
    config.logits_scaling, config.logit_scale = 1.0, 0.7
    model.logit_scale = 0.2
    wrong = language_head(model)
    assert wrong is not None
    assert splits_head(model, {"input_ids": ids}) == (name == "Granite" and wrong.scale == 1.0)


def bert() -> Any:
    return transformers.BertLMHeadModel(
        transformers.BertConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            is_decoder=True,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def test_a_head_of_several_products_has_all_logits_and_refuses_chunks(tmp_path: Path) -> None:
    model = lte.sparsify_(bert(), lte.LteConfig(expert_size=8, grouping="contiguous"))
    assert not splits_head(model.eval(), {"input_ids": torch.arange(3, 9)[None]})

    def trainer(**options: Any) -> LteTrainer:
        arguments = lte.LteTrainingArguments(
            str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=4,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            logging_steps=1,
            router_fit_tokens=64,
            calibration_tokens=64,
            **options,
        )
        collator = LmCollator(PAD)
        return LteTrainer(model, arguments, train_dataset=ROWS, data_collator=collator)

    message = "loss_chunk_tokens must be 0 or unset here, got loss_chunk_tokens=8: the model's logits are not one"
    with pytest.raises(ValueError, match=message):
        trainer(loss_chunk_tokens=8).train()
    run = trainer()
    run.train()
    assert run.state.log_history[0]["task_loss"] > 0


def test_a_loss_of_the_users_own_is_computed_on_all_logits(tmp_path: Path) -> None:
    shapes = []

    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        shapes.append(outputs.logits.shape)
        return outputs.logits.square().mean()

    trainer = trainer_of(tmp_path, ROWS, save_strategy="no", max_steps=2)
    trainer.compute_loss_func = loss
    trainer.train()
    assert set(shapes) == {(4, 16, VOCAB)}


def test_a_hook_on_the_head_is_called_for_all_tokens(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, ROWS, save_strategy="no", max_steps=2)
    head: nn.Module = trainer.model.get_output_embeddings()
    tokens = []
    head.register_forward_hook(lambda module, args, output: tokens.append(output[..., 0].numel()))
    trainer.train()
    assert 64 in tokens


def test_evaluation_within_training_has_the_loss_of_all_logits(tmp_path: Path) -> None:
    found = []
    for tokens in (0, 8):
        trainer = trainer_of(
            tmp_path / str(tokens),
            ROWS,
            teacher=tiny_dense_model(),
            save_strategy="no",
            loss_chunk_tokens=tokens,
        )
        trainer.eval_dataset, trainer.args.eval_strategy, trainer.args.eval_steps = ROWS, IntervalStrategy.STEPS, 3
        trainer.train()
        found.append([entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry])
        logits = trainer.predict(ROWS).predictions
        assert logits.shape == (16, 16, VOCAB)
    assert len(found[0]) == 2
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_a_number_of_tokens_below_0_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="loss_chunk_tokens must not be negative, got loss_chunk_tokens=-1"):
        trainer_of(tmp_path, loss_chunk_tokens=-1)
