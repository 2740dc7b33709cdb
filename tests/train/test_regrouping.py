"""Moving neurons between experts while routers train: what is measured, what moves, and that nothing else changes."""

from __future__ import annotations

import copy
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lte
from lte.data.rows import LmCollator
from lte.hf.convert import permute_neurons_
from lte.hf.inputs import model_inputs
from lte.train.arguments import LteTrainingArguments
from lte.train.config import TrainConfig
from lte.train.regrouping import KeptContributions, Regrouping, kept_contributions
from lte.train.schedule import Schedule
from lte.train.trainer import LteTrainer
from lte.train.two_stage import train_two_stage
from tests.processes import run_forked
from tests.tiny_models import (
    EXPERT_SIZE,
    HIDDEN,
    MODEL_TYPES,
    NEURONS,
    PAD,
    logits_of,
    randomise_routers_,
    tiny_dense_model,
    tiny_sparse_model,
    zero_dropout_,
)
from tests.train.toy import toy_rows, trainer_of

EXPERTS = NEURONS // EXPERT_SIZE
BATCHES = [LmCollator(PAD)([toy_rows(16)[i] for i in range(start, start + 8)]) for start in (0, 8)]
# Without gate, with gate, stacked, stored the other way round, spread over blocks, with biases.
LAYOUTS = ["llama", "phi", "phi3", "gpt2", "opt", "bert", "t5 gated"]


def at_own_threshold(logits: list[Tensor], masks: list[Tensor]) -> Tensor:
    return torch.zeros(())


def random_regrouping(model: Any, seed: int = 0) -> Regrouping:
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(ffn.num_neurons, generator=generator) for ffn in lte.sparse_ffns(model).values()]
    return Regrouping(orders, 0.0, 0.0)


def optimiser_of(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def planted_model() -> Any:
    """Experts whose neurons all fire where the input lies along the direction that their router looks for."""
    model = lte.sparsify_(tiny_dense_model(), lte.LteConfig(expert_size=EXPERT_SIZE, grouping="contiguous"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for ffn in lte.sparse_ffns(model).values():
            directions = torch.linalg.qr(torch.randn(HIDDEN, EXPERTS, generator=generator)).Q.T
            ffn.router.weight.copy_(directions)
            ffn.router.bias.zero_()
            ffn.gate_proj.weight.copy_(3 * directions.repeat_interleave(EXPERT_SIZE, 0))
    return model


def homes(ffn: Any) -> Tensor:
    """The expert whose router looks where each neuron's gate does."""
    return (ffn.gate_proj.weight @ ffn.router.weight.T).argmax(1)


def test_planted_neurons_find_their_expert() -> None:
    model = planted_model()
    ffns = list(lte.sparse_ffns(model).values())
    own = torch.arange(NEURONS) // EXPERT_SIZE
    random_regrouping(model).apply_(ffns, optimiser_of(model))
    assert all((homes(ffn) == own).float().mean() < 0.4 for ffn in ffns)
    routers = [ffn.router.weight.clone() for ffn in ffns]
    regrouping = Regrouping.of(kept_contributions(model, BATCHES, at_own_threshold))
    regrouping.apply_(ffns, optimiser_of(model))
    for ffn, router in zip(ffns, routers, strict=True):
        assert torch.equal(homes(ffn), own)
        assert torch.equal(ffn.router.weight, router)
    assert regrouping.lost < 0.5 * regrouping.lost_before
    # Where all are at home, none moves.
    again = Regrouping.of(kept_contributions(model, BATCHES, at_own_threshold))
    assert again.moved(ffns) == 0
    # What the measure said before the move is what it says after it; the second layer's inputs have changed.
    first = kept_contributions(model, BATCHES, at_own_threshold)[0]
    kept = first.gather(1, own[:, None]).sum().item()
    assert 0 < kept < 1


def test_only_what_the_target_drops_is_lost() -> None:
    """The trainer's thresholds are those of the full target, wherever the ramp is."""
    model = planted_model()
    for share in (0.25, 0.5):

        def quantile(logits: list[Tensor], masks: list[Tensor], share: float = share) -> Tensor:
            return torch.cat([each.flatten() for each in logits]).quantile(share)

        found = kept_contributions(model, BATCHES, quantile)
        on = [affinity.sum(0) for affinity in found]
        # All neurons together have a contribution of 1, so a column's sum is how often its expert is on.
        assert torch.stack(on).mean().item() == pytest.approx(1 - share, abs=0.02)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_loss_that_is_measured_is_what_hard_mode_drops(model_type: str) -> None:
    model = tiny_sparse_model(model_type)
    regrouping = Regrouping.of(kept_contributions(model, BATCHES, at_own_threshold)[:1])
    ffn = next(iter(lte.sparse_ffns(model).values()))
    down = ffn.part(ffn.layout.down)
    norms = ffn.layout.matrix(down).detach().norm(dim=0)
    seen: dict[str, list[Tensor]] = {"hard": [], "dense": []}
    for mode, inputs in seen.items():
        handle = down.register_forward_pre_hook(lambda module, args, inputs=inputs: inputs.append(args[0]))
        for each in lte.sparse_ffns(model).values():
            each.set_mode(mode)
        with torch.no_grad():
            for batch in BATCHES:
                model(**model_inputs(model, batch))
        handle.remove()
    # In the first layer both modes read the same.
    hard, dense = ((torch.cat([x.reshape(-1, NEURONS) for x in inputs]) * norms) ** 2 for inputs in seen.values())
    assert regrouping.lost_before == pytest.approx((1 - hard.sum(1) / dense.sum(1)).mean().item(), rel=1e-4)
    assert regrouping.lost < regrouping.lost_before


def test_tokens_that_do_not_count_are_left_out() -> None:
    ffn = lte.sparse_ffns(planted_model())["model.layers.0.mlp"]
    hidden, logits = torch.randn(2, 3, NEURONS), torch.randn(2, 3, EXPERTS)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    some, all_of_them = KeptContributions(ffn, torch.zeros(())), KeptContributions(ffn, torch.zeros(()))
    some.update(hidden, logits, mask)
    all_of_them.update(hidden[mask], logits[mask], torch.ones(3, dtype=torch.bool))
    assert torch.equal(some.affinity, all_of_them.affinity)
    nothing = KeptContributions(ffn, torch.zeros(()))
    nothing.update(hidden, logits, torch.zeros(2, 3, dtype=torch.bool))
    assert not nothing.affinity.any()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_dense_function_stays(model_type: str, relative_rms: Any) -> None:
    model, tokens = tiny_sparse_model(model_type), BATCHES[0]["input_ids"]
    ffns = list(lte.sparse_ffns(model).values())
    for ffn in ffns:
        ffn.set_mode("dense")
    before = logits_of(model, tokens)
    weights = [ffn.layout.matrix(ffn.part(ffn.layout.down)).clone() for ffn in ffns]
    regrouping = random_regrouping(model)
    tensors = {name: parameter for name, parameter in model.named_parameters()}
    regrouping.apply_(ffns, optimiser_of(model))
    assert all(parameter is tensors[name] for name, parameter in model.named_parameters())
    for ffn, weight, order in zip(ffns, weights, regrouping.orders, strict=True):
        assert torch.equal(ffn.layout.matrix(ffn.part(ffn.layout.down)), weight[:, order])
    assert relative_rms(logits_of(model, tokens), before) < 1e-5
    # What hard mode drops is other neurons.
    for ffn in ffns:
        ffn.set_mode("hard")
    assert relative_rms(logits_of(model, tokens), before) > 1e-3


OPTIMISERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, amsgrad=True),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
    "plain": lambda parameters: torch.optim.SGD(parameters, lr=1e-2),
}


@pytest.mark.parametrize("model_type", LAYOUTS)
@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_step_after_the_move_is_the_move_after_a_step(model_type: str, name: str) -> None:
    first = zero_dropout_(tiny_sparse_model(model_type)).double()
    for ffn in lte.sparse_ffns(first).values():
        ffn.set_mode("dense")
    second = copy.deepcopy(first)
    for model, moves_early in ((first, True), (second, False)):
        optimizer = OPTIMISERS[name]([p for n, p in model.named_parameters() if "router" not in n])
        ffns = list(lte.sparse_ffns(model).values())
        for step in range(3):
            model(**model_inputs(model, BATCHES[0]), labels=BATCHES[0]["labels"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if (step == 0) == moves_early and step in (0, 2):
                random_regrouping(model).apply_(ffns, optimizer)
    for (path, one), other in zip(first.named_parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10, msg=path)


@pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao (pip install torchao)")
@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamW4bit"])
def test_narrow_moments_follow(kind: str, monkeypatch: pytest.MonkeyPatch, relative_rms: Any) -> None:
    import torchao.optim

    monkeypatch.setattr(torch, "compile", lambda function, *args, **kwargs: function)
    dense = tiny_dense_model(hidden_size=128, head_dim=32, intermediate_size=512)
    model = lte.sparsify_(dense, lte.LteConfig(expert_size=8, grouping="contiguous")).bfloat16()
    ffns = list(lte.sparse_ffns(model).values())
    for ffn in ffns:
        ffn.set_mode("dense")
    ours = [p for n, p in model.named_parameters() if "router" not in n]
    optimizer = getattr(torchao.optim, kind)(ours, lr=1e-3, block_size=256, bf16_stochastic_round=True)
    model(**model_inputs(model, BATCHES[0]), labels=BATCHES[0]["labels"]).loss.backward()
    optimizer.step()
    state = optimizer.state[ffns[0].down_proj.weight]
    before = {name: state[name].dequantize() for name in ("exp_avg", "exp_avg_sq")}
    types = {name: type(value) for name, value in state.items()}
    weight = ffns[0].down_proj.weight.clone()
    regrouping = random_regrouping(model)
    regrouping.apply_(ffns, optimizer)
    assert {name: type(value) for name, value in state.items()} == types
    assert types["exp_avg"] is not Tensor
    order = regrouping.orders[0]
    for name, moment in before.items():
        # As far as 8 or 4 bits go; in another order they are nothing alike.
        tolerance = 0.05 if kind == "AdamW8bit" else 0.35
        assert relative_rms(state[name].dequantize(), moment[:, order]) < tolerance, name
        assert relative_rms(state[name].dequantize(), moment) > 0.5, name
    assert torch.equal(ffns[0].down_proj.weight, weight[:, order])


def test_a_state_of_another_shape_is_refused_before_anything_moves() -> None:
    model = tiny_sparse_model()
    ffns = list(lte.sparse_ffns(model).values())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.state[ffns[1].down_proj.weight]["rows"] = torch.zeros(HIDDEN)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=r"optim must keep its moments as one number .* got optim=SGD with rows"):
        random_regrouping(model).apply_(ffns, optimizer)
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))


def regroupings(trainer: Any) -> dict[int, dict[str, float]]:
    """The entries of the log about moves, by their step."""
    return {entry["step"]: entry for entry in trainer.state.log_history if "regrouped_neurons" in entry}


LONG = {"max_steps": 12, "stage1_ratio": 0.75, "ramp_ratio": 1.0, "save_strategy": "no"}


@pytest.mark.parametrize("recipe", ["straight_through", "annealed", "paper"])
def test_neurons_move_at_the_set_steps_of_the_ramp(tmp_path: Path, recipe: str) -> None:
    moving = trainer_of(tmp_path / "a", **LONG, recipe=recipe, regroup_count=2)
    staying = trainer_of(tmp_path / "b", **LONG, recipe=recipe)
    assert staying.routing.regroup_count == 0
    moving.train()
    staying.train()
    # The ramp has 9 steps.
    found = regroupings(moving)
    assert list(found) == [3, 6]
    assert not regroupings(staying)
    for entry in found.values():
        assert 0 < entry["regrouped_neurons"] <= 1
        assert 0 < entry["lost_contribution"] < entry["lost_contribution_before"] < 1
        assert entry["stage"] == 1
    losses = [
        [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (moving, staying)
    ]
    assert losses[0][:3] == losses[1][:3]
    assert losses[0] != losses[1]
    # The loss goes on from where it was: a move is no new start.
    assert losses[0][3] == pytest.approx(losses[1][3], rel=0.1)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    saving = {**LONG, "save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2, "regroup_count": 2}
    whole = trainer_of(tmp_path / "whole", **saving)
    whole.train()
    # Before a move, where one follows at once, and after it.
    for step in (2, 3, 4, 6):
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        resumed = trainer_of(folder, **saving)
        resumed.train(resume_from_checkpoint=True)
        assert list(regroupings(resumed)) == [3, 6]
        for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(one, other), (step, name)
    other = trainer_of(tmp_path / "from-2", **{**saving, "regroup_count": 1})
    with pytest.raises(ValueError, match="regroup_count=1 where it began with regroup_count=2"):
        other.train(resume_from_checkpoint=True)


def test_layers_with_targets_and_experts_that_are_always_on(tmp_path: Path) -> None:
    """Each layer is measured at its own target, and the neurons that lose most come to experts that are always on."""
    config = lte.LteConfig(expert_size=8, grouping="random", always_on=0.25)
    model = lte.sparsify_(tiny_dense_model(), config, calibration=BATCHES)
    arguments = LteTrainingArguments(
        str(tmp_path),
        **LONG,
        layer_budgets="sensitivity",
        regroup_count=1,
        router_fit_tokens=128,
        calibration_tokens=256,
        report_to="none",
        use_cpu=True,
    )
    trainer = LteTrainer(model, arguments, train_dataset=toy_rows(16, 16), data_collator=LmCollator(PAD))
    trainer.train()
    (entry,) = regroupings(trainer).values()
    assert entry["lost_contribution"] < entry["lost_contribution_before"]
    for ffn in trainer.ffns:
        assert (ffn.router.bias[:2] > 500).all()
        assert not ffn.router.weight[:2].any()


def test_compiled_layers_are_not_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.testing import CompileCounter

    counter, compile_ = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compile_(*args, **{**kwargs, "backend": counter}))
    frames, models = [], []
    for number, options in enumerate(({"compile": True}, {"compile": True, "regroup_count": 1}, {"regroup_count": 1})):
        torch.compiler.reset()
        counter.clear()
        torch.manual_seed(0)
        model = lte.sparsify_(tiny_dense_model(), lte.LteConfig(expert_size=8, grouping="random"))
        config = TrainConfig(
            **{"batch_size": 8, "stage1_steps": 6, "stage2_steps": 2, "learning_rate": 1e-3, "report_to": "none"},
            **{"router_fit_tokens": 512, "calibration_tokens": 0},
            **options,
        )
        train_two_stage(model, toy_rows(64, 64), config, tmp_path / str(number))
        frames.append(counter.frame_count)
        models.append(model)
    assert frames[0] == frames[1] > frames[2] == 0
    for one, other in zip(models[1].parameters(), models[2].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_all_processes_move_the_same_neurons(tmp_path: Path) -> None:
    options = (
        '{"batch_size": 4, "stage1_steps": 8, "stage2_steps": 2, "regroup_count": 2, "router_fit_tokens": 512, '
        '"calibration_tokens": 512, "learning_rate": 3e-3, "report_to": "none"}'
    )
    run_forked("2", "tests.train.train_in_process", tmp_path, options)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    moves = [[entry for entry in rank["log"] if "regrouped_neurons" in entry] for rank in ranks]
    assert len(moves[0]) == 2
    assert moves[0][0]["regrouped_neurons"] > 0
    for name, weight in ranks[0]["weights"].items():
        assert torch.equal(weight, ranks[1]["weights"][name]), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regroup_count": -1}, "regroup_count must not be negative, got regroup_count=-1"),
        ({"regroup_count": 9}, "regroup_count must be below the 9 steps over which the target rises, got"),
        ({"regroup_count": 1, "stage1_ratio": 0.0}, "regroup_count must be 0 without stage 1"),
        ({"regroup_count": 1, "optim": "adafactor"}, r"one number for each weight .* optim=Adafactor with moments of"),
    ],
)
def test_what_cannot_move_is_refused_before_the_first_step(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, **{**LONG, **options}).train()


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes (pip install bitsandbytes)")
def test_packed_moments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"one number for each weight .* got optim=AdamW\w* with moments of"):
        trainer_of(tmp_path, **LONG, regroup_count=1, optim="adamw_bnb_8bit").train()


@pytest.mark.skipif(find_spec("peft") is None, reason="needs peft (pip install peft)")
def test_adapters_are_refused(tmp_path: Path) -> None:
    from peft import LoraConfig

    trainer = LteTrainer(
        randomise_routers_(tiny_sparse_model()),
        LteTrainingArguments(str(tmp_path), **LONG, regroup_count=1, report_to="none", use_cpu=True),
        train_dataset=toy_rows(16, 16),
        data_collator=LmCollator(PAD),
        peft_config=LoraConfig(r=2, target_modules=["down_proj"]),
    )
    with pytest.raises(ValueError, match="regroup_count must be 0 for a model with adapters"):
        trainer.train()


def test_moves_part_the_ramp_evenly() -> None:
    def steps(count: int, stage1: int = 100, ramp: float = 0.6) -> tuple[int, ...]:
        stages: Any = (None, None)
        return Schedule(stages, 250, stage1, 0.5, ramp, lambda total: 0, regroup_count=count).regroup_steps

    assert steps(0) == ()
    assert steps(1) == (30,)
    assert steps(2) == (20, 40)
    assert steps(4) == (12, 24, 36, 48)
    assert steps(5, stage1=6, ramp=1.0) == (1, 2, 3, 4, 5)


def test_a_permutation_of_a_permutation_comes_back() -> None:
    model = tiny_sparse_model("phi3")
    ffns = list(lte.sparse_ffns(model).values())
    before = copy.deepcopy(model.state_dict())
    regrouping = random_regrouping(model)
    regrouping.apply_(ffns, optimiser_of(model))
    for ffn, order in zip(ffns, regrouping.orders, strict=True):
        permute_neurons_(ffn, ffn.layout, order.argsort())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
