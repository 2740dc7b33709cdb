"""Losses that settings add, in a training: value and gradient against the formula written out, and what is logged."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from transformers import BertConfig, BertForSequenceClassification, default_data_collator

import lte
from lte.data.rows import LmCollator, TokenRows, token_mask
from lte.nn.evenness import EVEN_SHARPNESS
from lte.nn.locality import chunk_efficiency_loss, predecessor_loss, union_loss
from lte.nn.losses import efficiency_loss, margin_loss
from lte.train.added_terms import AddedTerms
from lte.train.arguments import LteTrainingArguments
from lte.train.documents import follows_document
from lte.train.objective import language_terms
from lte.train.trainer import LteTrainer
from tests.tiny_models import PAD, VOCAB, randomise_routers_, tiny_dense_model, zero_dropout_
from tests.train.test_trainer import Gradients, arguments, partly_labelled_rows
from tests.train.toy import toy_rows, trainer_of

EOS = 2


def rows_with_documents(count: int = 4, length: int = 16) -> TokenRows:
    rows = toy_rows(count, length)
    for index, row in enumerate(rows.input_ids):
        row[3 + index] = EOS
    return TokenRows(rows.input_ids, rows.input_ids)


def sparse_model(family: str = "llama", **options: Any) -> Any:
    model = lte.sparsify_(tiny_dense_model(family), lte.LteConfig(expert_size=8, grouping="random", **options))
    return randomise_routers_(model)


def another_model(family: str = "llama") -> Any:
    teacher = tiny_dense_model(family)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return teacher


def train(folder: Path, model: Any, rows: Any, **options: Any) -> tuple[LteTrainer, dict[str, Tensor]]:
    seen = Gradients()
    teacher = options.pop("teacher", None)
    settings = {"max_steps": 1, "per_device_train_batch_size": 4, "max_grad_norm": 0.0, "calibration_tokens": 0}
    trainer = LteTrainer(
        model,
        arguments(folder, **{**settings, "train_sampling_strategy": "sequential", **options}),
        train_dataset=rows,
        data_collator=LmCollator(PAD),
        callbacks=[seen],
        teacher=teacher,
    )
    trainer.train()
    return trainer, seen.found


def ffn_by_hand(ffn: Any, x: Tensor, on: Tensor) -> Tensor:
    hidden = torch.nn.functional.silu(ffn.gate_proj(x)) * ffn.up_proj(x)
    return ffn.down_proj(hidden * on.repeat_interleave(hidden.shape[-1] // on.shape[-1], -1))


def relative(one: Tensor, other: Tensor) -> Tensor:
    return ((one - other).square().sum(-1) / other.square().sum(-1)).mean()


def reference(model: Any, teacher: Any, rows: TokenRows, match_to: str, eta: float) -> tuple[float, dict[str, Tensor]]:
    """All terms in stage 2 of `straight_through`, in plain PyTorch, and the gradients of their sum."""
    batch = LmCollator(PAD)([rows[i] for i in range(4)])
    inputs, goals = [], []
    ffns = list(lte.sparse_ffns(model).values())
    hooks = [ffn.register_forward_pre_hook(lambda module, args: inputs.append(args[0])) for ffn in ffns]
    hooks += [
        layer.mlp.register_forward_hook(lambda module, args, out: goals.append(out)) for layer in teacher.model.layers
    ]
    for ffn in ffns:
        ffn.set_mode("straight_through")
    with torch.no_grad():
        teacher_logits = teacher(batch["input_ids"]).logits
    logits = model(batch["input_ids"], use_cache=False).logits
    for hook in hooks:
        hook.remove()
    _, divergence = language_terms(logits, batch["labels"], teacher_logits)
    follows = follows_document(batch, (EOS,))
    errors, terms, shares = [], [], []
    for ffn, x, goal in zip(ffns, inputs, goals, strict=True):
        scores = ffn.router(x)
        on = (scores > 0).float() + scores.sigmoid() - scores.sigmoid().detach()
        output = ffn_by_hand(ffn, x, on)
        own = ffn_by_hand(ffn, x, torch.ones_like(on)).detach()
        errors.append(relative(output, own if match_to == "own" else goal))
        soft = (EVEN_SHARPNESS * scores).sigmoid()
        shares.append(((scores > 0).float() + soft - soft.detach()).mean((1, 2)))
        pair = predecessor_loss(scores[None], follows)[0], union_loss(scores[None], follows, chunk=4)[0]
        terms.append(
            eta * efficiency_loss(scores.sigmoid())
            + 0.3 * margin_loss(scores, margin=1.5)
            + 0.2 * pair[0]
            + 0.7 * pair[1]
        )
    even = (torch.stack(shares).mean(0) / 0.5 - 1).square().mean()
    loss = divergence + 0.4 * torch.stack(errors).mean() + torch.stack(terms).mean() + 0.6 * even
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


ALL = {"margin_weight": 0.3, "margin_width": 1.5, "margin_start": 0.0, "predecessor_weight": 0.2, "union_weight": 0.7}
ALL |= {"union_tokens": 4, "match_weight": 0.4, "even_weight": 0.6}


@pytest.mark.parametrize("match_to", ["teacher", "own"])
@pytest.mark.parametrize("extra", [{}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}])
def test_loss_and_gradients_are_those_of_the_formula(tmp_path: Path, match_to: str, extra: dict[str, Any]) -> None:
    model, teacher, rows = sparse_model(), another_model(), rows_with_documents()
    if extra:
        # Means over two passes: of the same rows twice, so that they are those of one.
        half = TokenRows(rows.input_ids[:2] * 2, rows.labels[:2] * 2)
        rows = half
    loss, gradients = reference(copy.deepcopy(model), copy.deepcopy(teacher), rows, match_to, 0.03)
    options = {**ALL, "match_to": match_to, "stage1_ratio": 0.0, **extra}
    trainer, found = train(tmp_path, model, rows, teacher=teacher, **options)
    assert trainer.state.log_history[0]["loss_total"] == pytest.approx(loss, rel=1e-5)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    for name in ("margin_loss", "predecessor_loss", "union_loss", "even_loss", "match_loss"):
        assert trainer.state.log_history[0][name] > 0
    assert all(ffn.output is None and ffn.own_output is None for ffn in lte.sparse_ffns(model).values())
    assert not teacher.model.layers[0].mlp.down_proj._forward_hooks


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_outputs_of_all_kinds_of_ffns_are_matched_to_the_teachers(tmp_path: Path, family: str) -> None:
    """With the teacher's own weights and all experts on there is no error; with half of them there is some."""
    model, teacher = sparse_model(family), tiny_dense_model(family)
    for ffn in lte.sparse_ffns(model).values():
        torch.nn.init.constant_(ffn.router.bias, 50.0)
    options = {"match_weight": 1.0, "stage1_ratio": 0.0, "learning_rate": 0.0, "max_steps": 1}
    zero_dropout_(model)
    rows = rows_with_documents()
    trainer, _ = train(tmp_path / "on", model, rows, teacher=teacher, **options)
    assert trainer.state.log_history[0]["match_loss"] == pytest.approx(0, abs=1e-9)
    randomise_routers_(model)
    trainer, found = train(tmp_path / "off", model, rows, teacher=teacher, **options)
    assert trainer.state.log_history[0]["match_loss"] > 0.05
    assert any(gradient.any() for name, gradient in found.items() if "router" in name)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("match_to", ["teacher", "own"])
def test_compiled_and_checkpointed_training_is_the_eager_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, match_to: str, checkpointing: bool
) -> None:
    from lte.train.two_stage import CHECKPOINTING

    counter = CompileCounter()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compile_(*args, **{**kwargs, "backend": counter}))
    torch.compiler.reset()
    options = {**ALL, "match_to": match_to, "max_steps": 4, "router_fit_tokens": 0, CHECKPOINTING: checkpointing}
    options["price_on"] = "union"
    found = []
    for compiled in (False, True):
        model = sparse_model()
        trainer, _ = train(
            tmp_path / str(compiled),
            model,
            rows_with_documents(8),
            teacher=another_model(),
            **options,
            compile_layers=compiled,
        )
        found.append((model, trainer.state.log_history))
    assert counter.frame_count > 0
    for one, other in zip(found[0][0].parameters(), found[1][0].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    for one, other in zip(found[0][1][:4], found[1][1][:4], strict=True):
        assert one["match_loss"] == pytest.approx(other["match_loss"], rel=1e-3)
    torch.compiler.reset()


@pytest.mark.parametrize("match_to", ["teacher", "own"])
def test_one_compilation_serves_all_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, match_to: str) -> None:
    counter = CompileCounter()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compile_(*args, **{**kwargs, "backend": counter}))
    frames = []
    for layers in (2, 4):
        torch.compiler.reset()
        counter.clear()
        config = lte.LteConfig(expert_size=8, grouping="random")
        model = randomise_routers_(lte.sparsify_(tiny_dense_model(num_hidden_layers=layers), config))
        options = {**ALL, "match_to": match_to, "max_steps": 2, "router_fit_tokens": 0, "compile_layers": True}
        train(tmp_path / str(layers), model, rows_with_documents(8), **options,
              teacher=tiny_dense_model(num_hidden_layers=layers))  # fmt: skip
        frames.append(counter.frame_count)
    # Beside the layers the terms of all of them together are compiled, for each number of them.
    assert frames[0] == frames[1]
    torch.compiler.reset()


def test_the_margin_sets_in_late_in_stage_2_alone(tmp_path: Path) -> None:
    trainer, _ = train(
        tmp_path, sparse_model(), rows_with_documents(8), max_steps=8, margin_weight=0.1, margin_start=0.5
    )
    logged = ["margin_loss" in entry for entry in trainer.state.log_history if "active_fraction" in entry]
    assert logged == [False] * 6 + [True] * 2


def test_the_margin_pushes_scores_away_from_the_threshold_and_the_sparsity_stays(tmp_path: Path) -> None:
    shares, active = [], []
    for weight in (0.0, 1.0):
        options = {"max_steps": 120, "margin_weight": weight, "margin_start": 0.0, "router_learning_rate": 3e-3}
        trainer, _ = train(tmp_path / str(weight), sparse_model(), toy_rows(64), per_device_train_batch_size=8,
                           stage1_ratio=0.25, **options)  # fmt: skip
        last = [entry for entry in trainer.state.log_history if "near_threshold" in entry][-20:]
        shares.append(sum(entry["near_threshold"] for entry in last) / 20)
        active.append(sum(entry["active_fraction"] for entry in last) / 20)
    assert shares[1] < 0.75 * shares[0]
    assert active[1] == pytest.approx(active[0], abs=0.03)


def test_neighbours_come_to_share_experts(tmp_path: Path) -> None:
    def differing(model: Any) -> float:
        ffns = lte.sparse_ffns(model.eval()).values()
        for ffn in ffns:
            ffn.record_logits = True
        with torch.no_grad():
            model(LmCollator(PAD)([toy_rows(8)[i] for i in range(8)])["input_ids"])
        return torch.stack([(ffn.logits[:, 1:] > 0).ne(ffn.logits[:, :-1] > 0).float().mean() for ffn in ffns]).mean()

    found = []
    for options in ({}, {"predecessor_weight": 1.0}, {"union_weight": 2.0, "union_tokens": 4}):
        model = sparse_model()
        train(tmp_path / str(len(found)), model, toy_rows(64), max_steps=100, per_device_train_batch_size=8,
              router_learning_rate=3e-3, calibration_tokens=2048, **options)  # fmt: skip
        found.append(differing(model))
    assert found[1] < 0.8 * found[0]
    assert found[2] < 0.9 * found[0]


@pytest.mark.parametrize("budgets", ["free", "sensitivity"])
def test_the_price_is_on_the_chunks(tmp_path: Path, budgets: str) -> None:
    """One step of stage 1 with an eta of its own, or prices by layer, against the formula."""
    model, rows = sparse_model(), rows_with_documents()
    options = {"price_on": "union", "union_tokens": 4, "stage1_ratio": 1.0, "router_fit_tokens": 0}
    options |= {"eta": 0.7} if budgets == "free" else {"layer_budgets": budgets}
    twin = copy.deepcopy(model)
    trainer, found = train(tmp_path, model, rows, **options)
    batch = LmCollator(PAD)([rows[i] for i in range(4)])
    for ffn in lte.sparse_ffns(twin).values():
        ffn.set_mode("straight_through")
        ffn.record_logits = True
    task, _ = language_terms(twin(batch["input_ids"], use_cache=False).logits, batch["labels"])
    follows = follows_document(batch, (EOS,))
    prices = [chunk_efficiency_loss(ffn.logits[None], follows, chunk=4)[0] for ffn in lte.sparse_ffns(twin).values()]
    eta = 0.7 if budgets == "free" else 0.03
    (task + eta * torch.stack(prices).mean()).backward()
    assert trainer.state.log_history[0]["chunk_efficiency_loss"] == pytest.approx(torch.stack(prices).mean().item())
    assert "efficiency_loss" in trainer.state.log_history[0]
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("tokens", "warned"), [(4, 0), (40, 1)])
def test_a_price_on_chunks_that_no_text_fills_is_told_once(tmp_path: Path, tokens: int, warned: int) -> None:
    options = {"price_on": "union", "union_tokens": tokens, "router_fit_tokens": 0, "max_steps": 2}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(tmp_path, sparse_model(), rows_with_documents(), **options)
    said = [str(each.message) for each in caught if "found no chunk" in str(each.message)]
    assert len(said) == warned
    assert all(f"price_on=union found no chunk of union_tokens={tokens} tokens in the first" in text for text in said)


def active_by_row(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The share of experts above the threshold in each row, over layers and the tokens that count."""
    ffns = list(lte.sparse_ffns(model.eval()).values())
    for ffn in ffns:
        ffn.record_logits = True
    with torch.no_grad():
        model(batch["input_ids"])
    by_token = torch.stack([(ffn.logits > ffn.threshold_logit).float().mean(-1) for ffn in ffns]).mean(0)
    mask = token_mask(batch).float()
    return (by_token * mask).sum(-1) / mask.sum(-1)


@pytest.mark.parametrize("size", [4, 1])
def test_rows_are_held_at_the_target_by_the_tokens_that_count(tmp_path: Path, size: int) -> None:
    """Also with one row in a pass; a row that counts no token is left out."""
    rows = partly_labelled_rows(4)
    rows.labels[2][:] = -100
    model = sparse_model()
    options = {"per_device_train_batch_size": size, "stage1_ratio": 0.0, "even_weight": 1.0, "max_steps": 1}
    trainer, _ = train(tmp_path, copy.deepcopy(model), rows, **options)
    shares = active_by_row(model, LmCollator(PAD)([rows[i] for i in range(size)]))
    counted = shares[~shares.isnan()]
    assert len(counted) == max(1, size - 1)
    assert trainer.state.log_history[0]["even_loss"] == pytest.approx(
        ((counted / 0.5 - 1) ** 2).mean().item(), rel=1e-4
    )


def two_kinds(count: int, seed: int = 0) -> TokenRows:
    """Rows of the walk, and after each one of a single token."""
    tokens = np.random.default_rng(seed).integers(3, VOCAB, count // 2)
    walks = toy_rows(count // 2, seed=seed).input_ids
    rows = [row for walk, token in zip(walks, tokens, strict=True) for row in (walk, np.full_like(walk, token))]
    return TokenRows(rows, rows)


def test_two_kinds_of_rows_become_as_sparse_as_each_other(tmp_path: Path) -> None:
    unseen = two_kinds(64, seed=1)
    batch = LmCollator(PAD)([unseen[i] for i in range(64)])
    apart = []
    for weight in (0.0, 3.0):
        model = sparse_model()
        train(tmp_path / str(weight), model, two_kinds(64), max_steps=150, per_device_train_batch_size=8,
              router_learning_rate=3e-3, calibration_tokens=2048, even_weight=weight)  # fmt: skip
        shares = active_by_row(model, batch)
        assert shares.mean().item() == pytest.approx(0.5, abs=0.05)
        apart.append((shares[0::2].mean() - shares[1::2].mean()).abs().item())
    assert apart[0] > 0.05
    assert apart[1] < 0.5 * apart[0]


def test_even_rows_follow_the_ramp_and_resume(tmp_path: Path) -> None:
    """The goal is the share that the step shall have; that is all there is to remember."""
    options = {"even_weight": 1.0, "ramp_ratio": 1.0, "stage1_ratio": 0.75, "max_steps": 8}
    whole = trainer_of(tmp_path / "whole", **options)
    goals = []
    of_step = whole._target_active
    whole._target_active = lambda device: goals.append(of_step(device).item()) or of_step(device)
    whole.train()
    assert goals == pytest.approx([1 - 0.5 * step / 6 for step in range(1, 7)] + [0.5, 0.5])
    resumed = trainer_of(tmp_path / "again", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_compiled_terms_are_compiled_once_for_all_steps_of_the_ramp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = CompileCounter()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compile_(*args, **{**kwargs, "backend": counter}))
    frames = []
    for steps in (2, 6):
        torch.compiler.reset()
        counter.clear()
        options = {"even_weight": 1.0, "ramp_ratio": 1.0, "stage1_ratio": 1.0, "compile_layers": True}
        train(tmp_path / str(steps), sparse_model(), rows_with_documents(8), max_steps=steps, **options)
        frames.append(counter.frame_count)
    assert frames[0] == frames[1] > 0
    torch.compiler.reset()


def test_without_a_weight_no_row_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def called(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("rows are counted")

    monkeypatch.setattr("lte.train.added_terms.row_active_shares", called)
    options = {"margin_weight": 0.1, "margin_start": 0.0, "stage1_ratio": 0.0}
    trainer, _ = train(tmp_path, sparse_model(), rows_with_documents(), **options)
    assert "margin_loss" in trainer.state.log_history[0]
    assert "even_loss" not in trainer.state.log_history[0]
    with pytest.raises(AssertionError, match="rows are counted"):
        train(tmp_path, sparse_model(), rows_with_documents(), even_weight=0.1)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="match_to must be own without a teacher"):
        train(tmp_path, sparse_model(), rows_with_documents(), match_weight=1.0)
    shallow = tiny_dense_model(num_hidden_layers=1)
    with pytest.raises(ValueError, match="match_to must be own with a teacher of other layers"):
        train(tmp_path, sparse_model(), rows_with_documents(), match_weight=1.0, teacher=shallow)
    with pytest.raises(ValueError, match="match_to must be teacher for FFNs that are spread"):
        train(tmp_path, sparse_model("opt"), rows_with_documents(), match_weight=1.0, match_to="own")
    config = BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    model = lte.sparsify_(BertForSequenceClassification(config), lte.LteConfig(expert_size=8))
    with pytest.raises(ValueError, match="union_weight must be 0 for models that do not predict"):
        LteTrainer(model, arguments(tmp_path, union_weight=1.0), train_dataset=[])
    with pytest.raises(ValueError, match="price_on must be mean for models that do not predict the next token"):
        LteTrainer(model, arguments(tmp_path, price_on="union"), train_dataset=[])


def test_a_margin_needs_the_stage_that_it_acts_in(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"margin_weight must be 0 without stage 2, .* got margin_weight=0.1"):
        train(tmp_path, sparse_model(), rows_with_documents(), margin_weight=0.1, stage1_ratio=1.0)


def test_batches_without_tokens_have_no_neighbours(tmp_path: Path) -> None:
    model = sparse_model()
    embedded = [{"inputs_embeds": torch.randn(8, 32), "labels": torch.arange(8)} for _ in range(4)]
    with pytest.raises(ValueError, match="union_weight must be 0, and price_on mean, where a batch"):
        LteTrainer(
            model,
            arguments(tmp_path, max_steps=1, union_weight=1.0, stage1_ratio=0.0, remove_unused_columns=False),
            train_dataset=embedded,
            data_collator=default_data_collator,
        ).train()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("margin_width", 0.0, "margin_width must be positive, got margin_width=0.0"),
        ("margin_start", 1.0, "margin_start must lie in"),
        ("match_weight", -1.0, "match_weight must not be negative"),
        ("even_weight", -0.1, "even_weight must not be negative, got even_weight=-0.1"),
        ("union_tokens", 1, "union_tokens must be at least 2"),
        ("price_on", "chunks", "price_on must be one of mean, union"),
        ("match_to", "students", "match_to must be one of teacher, own"),
        ("layer_budgets", "sensitive", "layer_budgets must be one of free, sensitivity"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path: Path, name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LteTrainingArguments(output_dir=str(tmp_path), **{name: value})


def test_a_control_takes_the_settings_and_ignores_them(tmp_path: Path) -> None:
    options = {**ALL, "layer_budgets": "sensitivity", "recipe": "dense"}
    trainer, _ = train(tmp_path, tiny_dense_model(), rows_with_documents(), **options)
    assert trainer.match is None
    assert not AddedTerms()
