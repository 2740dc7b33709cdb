"""Training models with always-on experts and with biases for what is dropped."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import lte
from lte.data.rows import LmCollator
from lte.eval.kernels import use_kernels_
from lte.eval.sparsity import measure_sparsity
from lte.nn.router import ALWAYS_ON_LOGIT
from lte.ops.dispatch import FfnRunner
from lte.train.checkpoints import control_state_of
from lte.train.dropped_start import DroppedStart, mean_dropped_outputs
from lte.train.router_init import fit_routers_
from lte.train.trainer import LteTrainer
from tests.tiny_models import PAD, randomise_routers_, tiny_dense_model
from tests.train.test_trainer import arguments
from tests.train.toy import toy_rows

BATCHES = [LmCollator(PAD)([toy_rows(16)[i] for i in range(start, start + 8)]) for start in (0, 8)]


def biased_model(target: float = 0.5, **options: Any) -> Any:
    config = lte.LteConfig(
        expert_size=8, target_sparsity=target, dropped_bias=True, **{"grouping": "random", **options}
    )
    return lte.sparsify_(tiny_dense_model(), config, calibration=BATCHES)


def trained(folder: Path, model: Any, **options: Any) -> LteTrainer:
    trainer = LteTrainer(model, arguments(folder, **options), train_dataset=toy_rows(64), data_collator=LmCollator(PAD))
    trainer.train()
    return trainer


def test_means_are_those_of_the_outputs_of_dropped_experts() -> None:
    """Against the outputs of the same FFNs with and without what is below the threshold."""
    model = randomise_routers_(biased_model())
    found = mean_dropped_outputs(model, BATCHES, 0.25)
    ffns = list(lte.sparse_ffns(model).values())
    inputs: list[list[Tensor]] = [[] for _ in ffns]
    for ffn, seen in zip(ffns, inputs, strict=True):
        ffn.set_mode("dense")
        ffn.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
    with torch.no_grad():
        for batch in BATCHES:
            model(batch["input_ids"])
        x = [torch.cat(seen) for seen in inputs]
        logits = [ffn.router(each) for ffn, each in zip(ffns, x, strict=True)]
        halves = torch.stack([torch.stack([each[:8], each[8:]]) for each in logits]).transpose(0, 1)
        threshold = torch.stack([half.quantile(0.25) for half in halves]).mean()
        for ffn, each, wanted in zip(ffns, x, found, strict=True):
            ffn.router.bias -= threshold
            ffn.set_mode("dense")
            dense = ffn(each)
            ffn.set_mode("hard")
            torch.testing.assert_close((dense - ffn(each)).mean((0, 1)), wanted, rtol=1e-4, atol=1e-6)


def test_the_start_follows_the_ramp_and_a_checkpoint_knows_how_far(tmp_path: Path) -> None:
    model = biased_model()
    options = {"max_steps": 8, "ramp_ratio": 1.0, "learning_rate": 0.0, "router_learning_rate": 0.0}
    trainer = trained(tmp_path, model, **options, save_strategy="steps", save_steps=2)
    start = trainer.dropped_start
    assert isinstance(start, DroppedStart)
    fitted = biased_model()
    fit_routers_(fitted, BATCHES)
    for ffn, vector in zip(lte.sparse_ffns(model).values(), start.vectors, strict=True):
        assert vector.norm() > 0
        # Nothing was trained: what there is has been added.
        torch.testing.assert_close(ffn.down_proj.bias.detach(), vector)
    assert control_state_of(tmp_path / "checkpoint-2")["dropped_start"]["share"] == 0.5
    assert start.share == 1.0


@pytest.mark.parametrize("steps", [7, 2000])
def test_biases_in_bf16_get_the_whole_vector(steps: int) -> None:
    model = biased_model()
    fit_routers_(model, BATCHES)
    ffns = list(lte.sparse_ffns(model).values())
    vectors = mean_dropped_outputs(model, BATCHES, 0.5)
    model.bfloat16()
    ffns[0].down_proj.bias.requires_grad_(False)
    start = DroppedStart(ffns, vectors)
    for step in range(steps):
        start.follow_((step + 1) / steps)
        if step == steps // 2:
            start = DroppedStart.of_state(ffns, start.state())
    assert not ffns[0].down_proj.bias.any(), "frozen"
    for ffn, vector in zip(ffns[1:], vectors[1:], strict=True):
        error = (ffn.down_proj.bias.float() - vector).norm() / vector.norm()
        assert error <= 0.01


def test_a_resumed_run_with_biases_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    whole = biased_model()
    trained(tmp_path / "a", whole, **options)
    again = biased_model()
    trainer = LteTrainer(
        again, arguments(tmp_path / "a", **options), train_dataset=toy_rows(64), data_collator=LmCollator(PAD)
    )
    for folder in (tmp_path / "a").glob("checkpoint-[46]"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    trainer.train(resume_from_checkpoint=True)
    for (name, one), other in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_the_start_is_nearer_to_the_dense_outputs_than_none() -> None:
    errors = {}
    for share in (0.0, 1.0):
        model = biased_model()
        fit_routers_(model, BATCHES)
        ffns = list(lte.sparse_ffns(model).values())
        vectors = mean_dropped_outputs(model, BATCHES, 0.5)
        DroppedStart(ffns, vectors).follow_(share)
        lte.calibrate_(model, BATCHES)
        seen: list[Tensor] = []
        first = ffns[0]
        handle = first.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model(BATCHES[0]["input_ids"])
            handle.remove()
            sparse = first(seen[0])
            first.set_mode("dense")
            dense = first(seen[0]) - first.down_proj.bias
        errors[share] = (sparse - dense).square().sum().item()
    assert errors[1.0] < errors[0.0]


def test_biases_train_in_both_stages(tmp_path: Path) -> None:
    for ratio in (0.0, 1.0):
        model = randomise_routers_(biased_model())
        trained(tmp_path / str(ratio), model, stage1_ratio=ratio)
        assert all(ffn.down_proj.bias.any() for ffn in lte.sparse_ffns(model).values())


def test_adapters_refuse_biases(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="dropped_bias must be false for a model with adapters"):
        LteTrainer(
            biased_model(),
            arguments(tmp_path),
            train_dataset=toy_rows(8),
            data_collator=LmCollator(PAD),
            peft_config=config,
        )


def test_biases_that_would_get_no_start_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"router_fit_tokens must be positive with dropped_bias, .*router_fit_tokens=0"
    ):
        trained(tmp_path, biased_model(), router_fit_tokens=0)
    message = "dropped_bias must be false where no controller holds the target, .* with recipe=paper"
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, biased_model(), recipe="paper")
    # A control routes nothing.
    trained(tmp_path, biased_model(), recipe="dense", router_fit_tokens=0, max_steps=1)


def test_a_target_that_whole_experts_leave_out_of_reach_is_refused_before_the_grouping(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def too_late(*arguments: Any) -> None:
        raise AssertionError("neurons are grouped")

    monkeypatch.setattr("lte.hf.convert._activity", too_late)
    config = lte.LteConfig(expert_size=8, always_on=0.01, target_sparsity=0.9)
    message = "target_sparsity must be at most 0.875 where 1 of 8 experts are always on, got target_sparsity=0.9"
    with pytest.raises(ValueError, match=message):
        lte.sparsify_(tiny_dense_model(), config, calibration=BATCHES)


@pytest.mark.parametrize("recipe", ["straight_through", "annealed"])
@pytest.mark.parametrize("rank", [None, 4])
def test_always_on_experts_stay_on_and_the_target_is_met(tmp_path: Path, recipe: str, rank: int | None) -> None:
    config = lte.LteConfig(expert_size=8, grouping="contribution", always_on=0.25, router_rank=rank)
    model = lte.sparsify_(tiny_dense_model(), config, calibration=BATCHES)
    before = copy.deepcopy(model.state_dict())
    trained(tmp_path, model, max_steps=60, recipe=recipe, router_learning_rate=3e-3, stage2_routers="trained")
    assert measure_sparsity(model, BATCHES).sparsity == pytest.approx(0.5, abs=0.06)
    for name, ffn in lte.sparse_ffns(model).items():
        assert not ffn.router.weight[:2].any()
        assert ffn.router.bias[:2].min() > 0.9 * ALWAYS_ON_LOGIT
        assert not torch.equal(ffn.router.weight[2:], before[f"{name}.router.weight"][2:])
    active = measure_sparsity(model, BATCHES)
    assert all(min(layer[:2]) == 1.0 for layer in active.expert_use)


def test_low_rank_routers_start_as_the_best_approximation_of_fitted_ones() -> None:
    def logits(rank: int | None) -> Tensor:
        config = lte.LteConfig(expert_size=8, grouping="random", router_rank=rank)
        model = lte.sparsify_(tiny_dense_model(), config)
        fit_routers_(model, BATCHES)
        ffn = next(iter(lte.sparse_ffns(model).values()))
        seen: list[Tensor] = []
        ffn.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        ffn.set_mode("dense")
        with torch.no_grad():
            model(torch.cat([batch["input_ids"] for batch in BATCHES]))
            return ffn.router(seen[0]).flatten(0, 1).double()

    full = logits(None)
    varying = full - full.mean(0)
    errors = [(logits(rank) - full).square().sum().item() / varying.square().sum().item() for rank in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    # Of rank 8 with 8 experts nothing is lost.
    assert errors[-1] < 1e-8
    values = torch.linalg.svdvals(varying)
    assert errors[1] < 2 * ((values[2:].square().sum() / values.square().sum()).item() + 1e-3)


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_every_size_and_rank_trains_saves_and_runs_on_the_kernels_or_says_why_not(
    tmp_path: Path, size: int, rank: int | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What numba compiles takes a minute, and is the same for all.
    monkeypatch.setattr(FfnRunner, "_cpu_kernel_takes", lambda self, tokens, dtype: False)
    dense = tiny_dense_model(intermediate_size=256)
    model = lte.sparsify_(dense, lte.LteConfig(expert_size=size, grouping="contribution", router_rank=rank),
                          calibration=BATCHES)  # fmt: skip
    before = copy.deepcopy(model.state_dict())
    trained(tmp_path / "run", model, max_steps=40, calibration_tokens=4096)
    # A low-rank router's bias and both its factors train, too.
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval().save_pretrained(tmp_path / "model")
    tokens = BATCHES[0]["input_ids"][:1, :12]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        expected = model(tokens).logits
        assert torch.equal(loaded(tokens).logits, expected)
        use_kernels_(loaded, "auto")
        torch.testing.assert_close(loaded(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    said = capsys.readouterr().err
    if size == 128:
        assert "Kernels off: expert_size must be one of 8, 16, 32, 64 for the kernels, got expert_size=128" in said
    else:
        assert lte.is_accelerated(loaded)
    assert measure_sparsity(model, BATCHES).sparsity == pytest.approx(0.5, abs=0.08)
