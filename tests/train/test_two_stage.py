"""Both training stages on a toy language: what trains, what holds the target, and what a resumed run gives."""

import copy
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

import lte
from lte.data.rows import LmCollator
from lte.eval.sparsity import measure_sparsity
from lte.train.config import TrainConfig, stages_of
from lte.train.objective import NonFiniteLossError
from lte.train.processes import training_device
from lte.train.sparsity_controller import EtaController
from lte.train.summary import TrainingSummary
from lte.train.trainer import LteTrainer
from lte.train.two_stage import train_two_stage
from tests.tiny_models import PAD, tiny_dense_model, tiny_sparse_model
from tests.train.toy import toy_rows

FAST = {"batch_size": 8, "learning_rate": 3e-3, "logging_steps": 2, "save_steps": 4, "router_fit_tokens": 512,
        "calibration_tokens": 2048}  # fmt: skip


def config(**options):
    return TrainConfig(**{**FAST, "stage1_steps": 6, "stage2_steps": 6, **options})


def fresh_model(target=0.5):
    model = tiny_dense_model().to(training_device())
    return lte.sparsify_(model, lte.LteConfig(expert_size=8, grouping="random", target_sparsity=target))


def held_out():
    rows = toy_rows(256, seed=9)
    return [LmCollator(PAD)([rows[i] for i in range(len(rows))])]


def same_weights(one, other):
    return all(a.equal(b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("recipe", ["straight_through", "annealed"])
@pytest.mark.parametrize("target", [0.25, 0.6])
def test_the_measured_sparsity_meets_the_target(tmp_path, recipe, target):
    model = fresh_model(target)
    options = config(recipe=recipe, stage1_steps=30, stage2_steps=20, calibration_tokens=8192)
    train_two_stage(model, toy_rows(256), options, tmp_path)
    assert measure_sparsity(model, held_out()).sparsity == pytest.approx(target, abs=0.01)


def test_calibration_is_what_meets_the_target(tmp_path):
    model = fresh_model(0.6)
    train_two_stage(model, toy_rows(), config(calibration_tokens=0, stage1_steps=4, stage2_steps=4), tmp_path)
    assert measure_sparsity(model, held_out()).sparsity < 0.5


@pytest.mark.parametrize("recipe", ["straight_through", "annealed", "paper", "dense"])
def test_every_recipe_trains_what_it_says(tmp_path, recipe):
    model = fresh_model()
    start = copy.deepcopy(model.state_dict())
    train_two_stage(model, toy_rows(), config(recipe=recipe), tmp_path)
    changed = {name for name, value in model.state_dict().items() if not value.equal(start[name])}
    routers = {name for name in start if ".router." in name}
    assert changed == set(start) - (routers if recipe == "dense" else set())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert {ffn.mode for ffn in lte.sparse_ffns(model).values()} == {"hard"}


def test_frozen_routers_keep_their_weights_in_stage_2(tmp_path):
    model = fresh_model()
    train_two_stage(model, toy_rows(), config(recipe="paper"), tmp_path, stages=(1,))
    before = copy.deepcopy(model.state_dict())
    train_two_stage(model, toy_rows(), config(recipe="paper"), tmp_path / "b", stages=(2,))
    for name, value in model.state_dict().items():
        assert value.equal(before[name]) == (".router." in name)


@pytest.mark.parametrize("trainable", ["ffn", "routers"])
def test_the_trainable_part_is_all_that_changes(tmp_path, trainable):
    model = fresh_model()
    start = copy.deepcopy(model.state_dict())
    train_two_stage(model, toy_rows(), config(trainable=trainable), tmp_path)
    part = ".router." if trainable == "routers" else ".mlp."
    for name, value in model.state_dict().items():
        assert value.equal(start[name]) == (part not in name), name


def test_the_papers_recipe_uses_both_router_losses_and_no_calibration():
    first, second = stages_of(config(recipe="paper", eta=0.7))
    assert (first.mode, first.eta, first.controls_eta) == ("soft", 0.7, False)
    assert (second.mode, second.train_routers, second.controls_bias, second.controls_eta) == (
        "hard",
        False,
        False,
        False,
    )
    assert config(recipe="paper").separability_weight == 0.5
    assert not config(recipe="paper").holds_target


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("recipe", ["straight_through", "annealed"])
@pytest.mark.parametrize("step", [2, 5, 6, 7, 11])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, monkeypatch, recipe, step):
    whole = fresh_model()
    options = config(recipe=recipe, save_steps=2)
    reference = train_two_stage(whole, toy_rows(), options, tmp_path / "whole")
    original = LteTrainer.__init__

    def interrupted(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.add_callback(StopAt(step))

    with monkeypatch.context() as patch:
        patch.setattr(LteTrainer, "__init__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_two_stage(fresh_model(), toy_rows(), options, tmp_path / "cut")
    resumed = fresh_model()
    summary = train_two_stage(resumed, toy_rows(), options, tmp_path / "cut", resume=True)
    assert same_weights(whole, resumed)
    assert [entry["loss"] for entry in summary.log_history[:-1]] == pytest.approx(
        [entry["loss"] for entry in reference.log_history[:-1]]
    )


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew_unasked(tmp_path):
    train_two_stage(fresh_model(), toy_rows(), config(), tmp_path, stages=(1,))
    for path in tmp_path.glob("checkpoint-*"):
        (path / "lte_control.json").unlink()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"lte_control.json is missing.*; delete its checkpoints to start anew"):
        train_two_stage(fresh_model(), toy_rows(), config(), tmp_path, stages=(1,), resume=True)
    assert sorted(tmp_path.rglob("*")) == before
    for path in tmp_path.glob("checkpoint-*"):
        (path / ".unfinished").touch()
        (path / "lte_manifest.json").unlink()
    summary = train_two_stage(fresh_model(), toy_rows(), config(), tmp_path, stages=(1,), resume=True)
    assert summary.tokens_trained > 0


def test_an_earlier_run_is_not_overwritten(tmp_path):
    train_two_stage(fresh_model(), toy_rows(), config(), tmp_path)
    with pytest.raises(ValueError, match=r"output_dir must hold no earlier run, .* resume"):
        train_two_stage(fresh_model(), toy_rows(), config(), tmp_path)


def test_the_log_holds_every_term(tmp_path):
    log = train_two_stage(fresh_model(), toy_rows(), config(), tmp_path).log_history
    entries = [entry for entry in log if "task_loss" in entry]
    names = {"task_loss", "efficiency_loss", "separability_loss", "eta", "active_fraction", "near_threshold",
             "target_sparsity", "stage", "step"}  # fmt: skip
    assert all(names <= set(entry) for entry in entries)
    assert {entry["stage"] for entry in entries} == {1, 2}
    assert all(math.isfinite(value) for entry in entries for value in entry.values())
    layers = [[value for name, value in entry.items() if name.startswith("layers/active_")] for entry in entries]
    assert [len(shares) for shares in layers] == [2] * len(entries)
    assert [sum(shares) / 2 for shares in layers] == pytest.approx([entry["active_fraction"] for entry in entries])
    assert len({tuple(shares) for shares in layers}) > 1


def test_the_history_of_the_layers_goes_on_over_both_stages(tmp_path):
    summary = train_two_stage(fresh_model(), toy_rows(), config(logging_steps=1), tmp_path)
    history = summary.layer_history()
    assert history["step"] == list(range(1, 13))
    assert history["stage"] == [1] * 6 + [2] * 6
    logged = [entry["layers/active_01"] for entry in summary.log_history if "layers/active_01" in entry]
    assert [shares[1] for shares in history["active_fraction"]] == pytest.approx(logged, abs=1e-4)
    few = summary.layer_history(most=3)
    assert few["step"] == [1, 6, 12]
    assert few["active_fraction"][-1] == history["active_fraction"][-1]
    assert TrainingSummary(0, 0.0, []).layer_history() is None


def test_the_log_goes_to_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = train_two_stage(fresh_model(), toy_rows(), config(), tmp_path).log_history
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    found = EventAccumulator(str(events)).Reload()
    entries = [entry for entry in log if "task_loss" in entry]
    for name in ("task_loss", "active_fraction", "eta", "layers/active_01", "stage"):
        scalars = [(scalar.step, scalar.value) for scalar in found.Scalars(f"train/{name}")]
        assert scalars[: len(entries)] == [(entry["step"], pytest.approx(entry[name], rel=1e-6)) for entry in entries]


def test_reporting_can_be_switched_off_and_names_what_is_missing(tmp_path, monkeypatch):
    train_two_stage(fresh_model(), toy_rows(), config(report_to="none"), tmp_path)
    assert not list(tmp_path.rglob("events.out.tfevents.*"))
    monkeypatch.setattr("lte.train.config.find_spec", lambda name: None)
    assert config().reporters == []
    with pytest.raises(ValueError, match=r"report_to must name an installed package, got report_to=wandb; pip install"):
        config(report_to="wandb")


def test_nan_stops_with_the_batch_saved_and_checkpoints_kept(tmp_path, monkeypatch):
    original = LteTrainer.training_step

    def poisoned(self, model, inputs, *args, **kwargs):
        if self.state.global_step == 5:
            self.model.lm_head.weight.data.fill_(float("nan"))
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(LteTrainer, "training_step", poisoned)
    with pytest.raises(NonFiniteLossError, match="became nan at step 5 of stage 1"):
        train_two_stage(fresh_model(), toy_rows(), config(), tmp_path)
    batch = torch.load(tmp_path / "nonfinite-step-5.pt")
    assert batch["input_ids"].shape == (8, 32)
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert all(parameter.isfinite().all() for parameter in kept.parameters())


def test_distillation_pulls_towards_the_teacher(tmp_path):
    teacher = tiny_dense_model()
    student = fresh_model(target=0.25)
    log = train_two_stage(
        student,
        toy_rows(),
        config(distillation_weight=1.0, stage1_steps=20, stage2_steps=40),
        tmp_path,
        teacher=teacher,
    ).log_history
    divergence = [entry["distillation_loss"] for entry in log if "distillation_loss" in entry]
    assert divergence[-1] < max(divergence) / 2
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert same_weights(teacher, tiny_dense_model())


def test_stage_2_goes_on_with_the_eta_of_stage_1(tmp_path):
    summary = train_two_stage(fresh_model(), toy_rows(), config(logging_steps=1, stage1_steps=30), tmp_path / "both")
    first = next(entry["eta"] for entry in summary.log_history if entry["stage"] == 2 and "eta" in entry)
    settled = train_two_stage(
        fresh_model(), toy_rows(), config(logging_steps=1, stage1_steps=30), tmp_path / "first", stages=(1,)
    ).eta
    assert settled != pytest.approx(EtaController().eta, rel=0.05)
    error = next(e for e in summary.log_history if e["stage"] == 2)["active_fraction"] - 0.5
    expected = EtaController.starting_at(settled)
    assert first == pytest.approx(expected.update(0.5, 0.5 - error), rel=1e-3)


@pytest.mark.parametrize("options", [{"recipe": "paper"}, {"recipe": "annealed"}, {"recipe": "straight_through"}])
def test_the_summary_has_the_eta_on_which_its_controller_settled(tmp_path, options):
    summary = train_two_stage(fresh_model(), toy_rows(), config(**options), tmp_path)
    controllers = [
        json.loads(path.read_text())["controller"] for path in tmp_path.glob("checkpoint-12/lte_control.json")
    ]
    assert [summary.eta] == [pytest.approx(math.exp(each["log_base"])) for each in controllers]


def test_without_a_controller_the_summary_has_no_eta(tmp_path):
    assert train_two_stage(fresh_model(), toy_rows(), config(recipe="paper", eta=0.5), tmp_path).eta is None


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_model_keeps_its_cache(tmp_path, use_cache):
    model = fresh_model()
    model.config.use_cache = use_cache
    train_two_stage(model, toy_rows(), config(), tmp_path)
    assert model.config.use_cache is use_cache


def test_gradient_checkpointing_is_on_while_training_and_off_after(tmp_path, monkeypatch):
    seen, original = [], LteTrainer.training_step

    def spy(self, *args, **kwargs):
        seen.append(self.model.model.layers[0].gradient_checkpointing)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LteTrainer, "training_step", spy)
    model = fresh_model()
    train_two_stage(model, toy_rows(), config(gradient_checkpointing=True), tmp_path)
    assert len(seen) == 12
    assert all(seen)
    assert not model.model.layers[0].gradient_checkpointing


@pytest.mark.parametrize(
    "option", [{"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2, "batch_size": 4}]
)
def test_memory_savers_change_nothing(tmp_path, option):
    plain, saved = fresh_model(), fresh_model()
    train_two_stage(plain, toy_rows(), config(recipe="annealed", router_fit_tokens=0), tmp_path / "a")
    train_two_stage(saved, toy_rows(), config(recipe="annealed", router_fit_tokens=0, **option), tmp_path / "b")
    for one, other in zip(plain.parameters(), saved.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-3)


def test_padding_changes_no_statistic(tmp_path):
    model = tiny_sparse_model()
    rows = [{"input_ids": torch.arange(3, 3 + n), "labels": torch.arange(3, 3 + n)} for n in (5, 9)]
    alone = [measure_sparsity(model, [LmCollator(PAD)([row])]) for row in rows]
    together = measure_sparsity(model, [LmCollator(PAD)(rows)])
    assert together.tokens == 14
    assert together.sparsity == pytest.approx(sum(m.sparsity * m.tokens for m in alone) / 14, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "papers"}, "did you mean paper"),
        ({"eta": -1.0}, "eta must not be negative"),
        ({"ramp_ratio": 0.0}, "ramp_ratio must lie in"),
        ({"batch_size": 0}, "batch_size must be positive"),
        ({"distillation_weight": 1.5}, "distillation_weight must lie in"),
    ],
)
def test_bad_settings_are_clear_errors(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_bad_calls_are_clear_errors(tmp_path):
    with pytest.raises(ValueError, match="model must be an LTE model"):
        train_two_stage(tiny_dense_model(), toy_rows(), config(), tmp_path)
    with pytest.raises(ValueError, match="stages must be"):
        train_two_stage(fresh_model(), toy_rows(), config(), tmp_path, stages=(3,))
    with pytest.raises(ValueError, match="teacher must be a dense model"):
        train_two_stage(fresh_model(), toy_rows(), config(distillation_weight=0.5), tmp_path)


def test_tokens_are_counted_without_padding(tmp_path):
    assert train_two_stage(fresh_model(), toy_rows(), config(), tmp_path, stages=(1,)).tokens_trained == 6 * 8 * 32
    lengths = [5 + index % 7 for index in range(64)]
    rows = [{"input_ids": torch.arange(3, 3 + n), "labels": torch.arange(3, 3 + n)} for n in lengths]
    options = config(stage1_steps=-1, stage2_steps=-1, gradient_accumulation_steps=2)
    summary = train_two_stage(fresh_model(), rows, options, tmp_path / "padded")
    assert summary.tokens_trained == 2 * sum(lengths)


def test_both_stages_train_in_bf16_and_leave_the_model_as_it_was(tmp_path, monkeypatch):
    dtypes = {1: set(), 2: set()}
    original = LteTrainer.compute_loss

    def recording(self, model, inputs, *args, **kwargs):
        head = self.model.get_output_embeddings()
        hook = head.register_forward_hook(lambda module, args, out: dtypes[self.stage.number].add(out.dtype))
        loss = original(self, model, inputs, *args, **kwargs)
        hook.remove()
        return loss

    monkeypatch.setattr(LteTrainer, "compute_loss", recording)
    model = fresh_model()
    before = set(vars(model))
    train_two_stage(model, toy_rows(), config(bf16=True), tmp_path)
    assert dtypes == {1: {torch.bfloat16}, 2: {torch.bfloat16}}
    assert set(vars(model)) == before
    batch = {name: value.to(model.device) for name, value in held_out()[0].items()}
    assert next(iter(model(**batch).values())).dtype == torch.float32
