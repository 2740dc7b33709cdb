"""`LteTrainer` as people use `Trainer`: their arguments, data, callbacks, evaluation and resume."""

import copy
import inspect
from typing import ClassVar

import datasets
import pytest
import torch
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertLMHeadModel,
    HfArgumentParser,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

import lte
from lte.data.rows import LmCollator, TokenRows, token_mask
from lte.eval.sparsity import measure_sparsity
from lte.nn.losses import efficiency_loss, separability_loss
from lte.train.arguments import LteTrainingArguments
from lte.train.trainer import LteTrainer
from tests.tiny_models import PAD, VOCAB, tiny_dense_model
from tests.train.toy import toy_rows


def arguments(folder, **options):
    defaults = {"max_steps": 8, "per_device_train_batch_size": 8, "learning_rate": 3e-3, "logging_steps": 1}
    defaults |= {"router_fit_tokens": 512, "calibration_tokens": 2048, "report_to": "none", "use_cpu": True}
    return LteTrainingArguments(output_dir=str(folder), **{**defaults, "save_strategy": "no", **options})


def fresh_model(target=0.5, **options):
    return lte.sparsify_(
        tiny_dense_model(), lte.LteConfig(expert_size=8, grouping="random", target_sparsity=target, **options)
    )


def partly_labelled_rows(count=8):
    """Rows that count very different numbers of labels."""
    rows = toy_rows(count)
    labels = [row.copy() for row in rows.labels]
    for index, row in enumerate(labels):
        row[: 3 * index] = -100
    return TokenRows(rows.input_ids, labels)


def columns(rows):
    return datasets.Dataset.from_dict({"input_ids": list(rows.input_ids), "labels": list(rows.labels)})


class Gradients(TrainerCallback):
    """Keeps the gradients of the first step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not hasattr(self, "found"):
            self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# Before 5.2x Trainer divides by all labels, the first of a row included, which no position predicts.
FIRST = int("_loss_shifts_labels" in inspect.getsource(Trainer.__init__))


def mean_loss(model, batch):
    """The loss that Trainer gives for a batch."""
    with torch.no_grad():
        loss = model(**batch).loss.item()
    return loss * ((batch["labels"][:, 1:] != -100).sum() / (batch["labels"][:, FIRST:] != -100).sum()).item()


def reference(model, rows, size, eta, lambda_):
    """The loss of one optimiser step over `rows` in passes of `size`, written out, and its gradients."""
    for ffn in lte.sparse_ffns(model).values():
        ffn.set_mode("soft")
        ffn.record_logits = True
    batches = [LmCollator(PAD)([rows[i] for i in range(s, s + size)]) for s in range(0, len(rows), size)]
    labelled = sum((batch["labels"][:, FIRST:] != -100).sum() for batch in batches)
    total = 0.0
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        shifted = logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
        cross_entropy = F.cross_entropy(*shifted, ignore_index=-100, reduction="sum") / labelled
        mask = token_mask(batch)
        scores = [torch.sigmoid(ffn.logits) for ffn in lte.sparse_ffns(model).values()]
        efficiency = torch.stack([efficiency_loss(s, mask) for s in scores]).mean()
        separability = torch.stack([separability_loss(s, mask) for s in scores]).mean()
        total = total + cross_entropy + (eta * efficiency + lambda_ * separability) / len(batches)
    total.backward()
    return total.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("passes", [1, 4])
def test_loss_and_gradients_are_those_of_the_formula(tmp_path, passes):
    model, rows = fresh_model(), partly_labelled_rows()
    loss, gradients = reference(copy.deepcopy(model), rows, 8 // passes, 0.7, 0.5)
    seen = Gradients()
    settings = {"recipe": "paper", "eta": 0.7, "max_steps": 2, "max_grad_norm": 0.0, "seed": 0}
    sizes = {"per_device_train_batch_size": 8 // passes, "gradient_accumulation_steps": passes}
    trainer = LteTrainer(
        model,
        arguments(tmp_path, **settings, **sizes, train_sampling_strategy="sequential"),
        train_dataset=rows,
        data_collator=LmCollator(PAD),
        callbacks=[seen],
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert trainer.state.log_history[0]["loss_total"] == pytest.approx(loss, rel=1e-5)
    assert seen.found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(seen.found[name], gradient, rtol=1e-4, atol=3e-7)


def test_the_quick_start_of_a_trainer_works_with_its_own_columns_and_collator(tmp_path):
    model, data = fresh_model(0.4), columns(toy_rows(256)).add_column("text", ["unused"] * 256)
    args = arguments(tmp_path, max_steps=40, calibration_tokens=8192)
    trainer = LteTrainer(model, args, default_data_collator, data, data.select(range(64)))
    trainer.train()
    metrics = trainer.evaluate()
    held_out = [default_data_collator([toy_rows(256)[i] for i in range(64)])]
    assert metrics["eval_sparsity"] == pytest.approx(measure_sparsity(model, held_out).sparsity, abs=1e-6)
    assert measure_sparsity(model, [LmCollator(PAD)([toy_rows(256, seed=9)[i] for i in range(256)])]).sparsity == (
        pytest.approx(0.4, abs=0.02)
    )
    assert metrics["eval_loss"] == pytest.approx(mean_loss(model, held_out[0]), rel=1e-4)
    assert {ffn.mode for ffn in lte.sparse_ffns(model).values()} == {"hard"}


def test_streams_train_and_need_a_number_of_steps(tmp_path):
    stream = columns(toy_rows(64)).to_iterable_dataset()
    model = fresh_model()
    before = copy.deepcopy(model.state_dict())
    LteTrainer(model, arguments(tmp_path), train_dataset=stream, data_collator=default_data_collator).train()
    assert not any(value.equal(before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="max_steps"):
        LteTrainer(model, arguments(tmp_path, max_steps=-1), train_dataset=stream)


def test_data_without_labels_is_refused_before_anything_runs(tmp_path):
    data = columns(toy_rows(8)).remove_columns("labels")
    trainer = LteTrainer(fresh_model(), arguments(tmp_path), train_dataset=data, data_collator=default_data_collator)
    with pytest.raises(
        ValueError,
        match="labels for LteLlamaForCausalLM, got input_ids; give the data a labels column",
    ):
        trainer.train()
    assert trainer.state.global_step == 0


def test_what_the_user_froze_stays_frozen(tmp_path):
    model = fresh_model()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    start = copy.deepcopy(model.state_dict())
    args = arguments(tmp_path, calibration_tokens=0, trainable="ffn", router_fit_tokens=0)
    LteTrainer(model, args, train_dataset=toy_rows(), data_collator=LmCollator(PAD)).train()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    changed = {name for name, value in model.state_dict().items() if not value.equal(start[name])}
    assert changed == {name for name in start if "layers.1.mlp" in name}


class Steps(TrainerCallback):
    def __init__(self, stop_at=None):
        self.seen, self.stop_at = [], stop_at

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(state.global_step)
        if state.global_step == self.stop_at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stop_at", [3, 7])
def test_resume_from_checkpoint_goes_on_in_either_stage(tmp_path, stop_at):
    def run(folder, resume=None, stop_at=None):
        model, steps = fresh_model(), Steps(stop_at)
        trainer = LteTrainer(
            model,
            arguments(folder, save_strategy="steps", save_steps=2),
            train_dataset=toy_rows(),
            data_collator=LmCollator(PAD),
            callbacks=[steps],
        )
        trainer.train(resume_from_checkpoint=resume)
        return model, steps.seen

    whole, steps = run(tmp_path / "whole")
    assert steps == list(range(1, 9))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop_at=stop_at)
    resumed, steps = run(tmp_path / "cut", resume=True)
    assert steps == list(range(stop_at, 9))
    for name, value in whole.state_dict().items():
        assert value.equal(resumed.state_dict()[name]), name
    with pytest.raises(ValueError, match="output_dir must hold a complete checkpoint"):
        run(tmp_path / "empty", resume=True)
    with pytest.raises(ValueError, match="resume_from_checkpoint must be a complete checkpoint"):
        run(tmp_path / "cut", resume=str(tmp_path))


def test_the_best_checkpoint_is_one_at_the_full_target(tmp_path):
    """Without a rule for it the first, least sparse checkpoint would be the best: the target rises, and the loss."""
    options = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    trainer = LteTrainer(
        fresh_model(0.75),
        arguments(tmp_path, **options, load_best_model_at_end=True, max_steps=12, learning_rate=1e-3),
        train_dataset=toy_rows(),
        eval_dataset=toy_rows(16, seed=3),
        data_collator=LmCollator(PAD),
    )
    trainer.train()
    evaluated = {entry["step"]: entry for entry in trainer.state.log_history if "eval_loss" in entry}
    assert evaluated.keys() == {2, 4, 6, 8, 10, 12}
    assert all(0 <= entry["eval_sparsity"] <= 1 for entry in evaluated.values())
    second = {step: entry["eval_loss"] for step, entry in evaluated.items() if step > 6}
    assert trainer.state.best_global_step == min(second, key=second.get)


@pytest.mark.parametrize(
    "options",
    [
        {"lr_scheduler_type": "cosine"},
        {"optim": "adafactor"},
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"num_train_epochs": 2, "max_steps": -1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_settings_of_the_trainer_work(tmp_path, options):
    model = fresh_model()
    start = copy.deepcopy(model.state_dict())
    trainer = LteTrainer(
        model,
        arguments(tmp_path, **options),
        train_dataset=toy_rows(),
        eval_dataset=toy_rows(8),
        data_collator=LmCollator(PAD),
    )
    trainer.train()
    assert not any(value.equal(start[name]) for name, value in model.state_dict().items())
    assert 0 <= trainer.evaluate()["eval_sparsity"] <= 1
    entries = [entry for entry in trainer.state.log_history if "active_fraction" in entry]
    assert [entry["stage"] for entry in entries] == [1] * (len(entries) // 2) + [2] * (len(entries) // 2)


def test_stock_arguments_take_the_default_recipe(tmp_path):
    stock = TrainingArguments(str(tmp_path), max_steps=4, report_to="none", use_cpu=True, save_strategy="no")
    trainer = LteTrainer(fresh_model(), stock, train_dataset=toy_rows(), data_collator=LmCollator(PAD))
    trainer.train()
    assert {entry.get("stage") for entry in trainer.state.log_history} == {1, 2}


def test_a_stock_model_trains_as_dense_control_alone(tmp_path):
    model = tiny_dense_model()
    start = copy.deepcopy(model.state_dict())
    args = arguments(tmp_path, recipe="dense")
    trainer = LteTrainer(model, args, train_dataset=toy_rows(), eval_dataset=toy_rows(8), data_collator=LmCollator(PAD))
    trainer.train()
    assert not any(value.equal(start[name]) for name, value in model.state_dict().items())
    assert "eval_sparsity" not in trainer.evaluate()
    with pytest.raises(ValueError, match="model must be an LTE model"):
        LteTrainer(tiny_dense_model(), arguments(tmp_path), train_dataset=toy_rows())


def test_reentrant_checkpointing_is_refused(tmp_path):
    name = "activation" if hasattr(arguments(tmp_path), "activation_checkpointing") else "gradient"
    options = {f"{name}_checkpointing": True, f"{name}_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match=r"checkpointing_kwargs must hold use_reentrant=False"):
        LteTrainer(fresh_model(), arguments(tmp_path, **options), train_dataset=toy_rows())


def test_a_teacher_distils_unless_its_weight_says_otherwise(tmp_path):
    def trainer(**options):
        return LteTrainer(
            fresh_model(),
            arguments(tmp_path, **options),
            train_dataset=toy_rows(),
            eval_dataset=toy_rows(8),
            data_collator=LmCollator(PAD),
            teacher=tiny_dense_model(),
        )

    whole = trainer()
    assert whole.distillation_weight == 1.0
    whole.train()
    first = whole.state.log_history[0]
    assert first["loss"] == pytest.approx(first["distillation_loss"] + whole.stages[0].eta, abs=0.2)
    batch = LmCollator(PAD)([toy_rows(8)[i] for i in range(8)])
    assert whole.evaluate()["eval_loss"] == pytest.approx(mean_loss(whole.model, batch), rel=1e-4)
    assert trainer(distillation_weight=0.0).distillation_weight == 0.0
    with pytest.raises(ValueError, match=r"teacher must be a dense model when distillation_weight=0\.5"):
        LteTrainer(fresh_model(), arguments(tmp_path, distillation_weight=0.5), train_dataset=toy_rows())


def labelled_sequences(count=8):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 90, (count, 12), generator=generator)
    return [{"input_ids": row, "labels": row.sum() % 2} for row in ids]


@pytest.mark.parametrize("passes", [1, 4])
def test_other_heads_are_averaged_over_accumulated_passes(tmp_path, passes):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForSequenceClassification(BertConfig(**sizes, **dropouts, num_attention_heads=2))
    lte.sparsify_(model, lte.LteConfig(expert_size=8, grouping="random"))
    rows = labelled_sequences()
    batch = default_data_collator(rows)
    expected = model.train()(**batch).loss
    expected.backward()
    gradient = model.classifier.weight.grad.clone()
    model.zero_grad()
    for ffn in lte.sparse_ffns(model).values():
        ffn.logits = None
    seen = Gradients()
    options = {"recipe": "paper", "eta": 0.0, "lambda_": 0.0, "max_steps": 1, "stage1_ratio": 0.0, "max_grad_norm": 0.0}
    sizes = {"per_device_train_batch_size": 8 // passes, "gradient_accumulation_steps": passes}
    trainer = LteTrainer(
        model,
        arguments(tmp_path, **options, **sizes, train_sampling_strategy="sequential"),
        train_dataset=rows,
        data_collator=default_data_collator,
        callbacks=[seen],
    )
    trainer.train()
    assert trainer.state.log_history[0]["task_loss"] == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(seen.found["classifier.weight"], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("recipe", ["annealed", "straight_through"])
def test_passes_without_a_label_count_for_nothing(tmp_path, recipe):
    rows = toy_rows(16)
    labels = [row if index % 3 else row * 0 - 100 for index, row in enumerate(rows.labels)]
    model = fresh_model()
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "recipe": recipe}
    trainer = LteTrainer(
        model,
        arguments(tmp_path, **options),
        train_dataset=TokenRows(rows.input_ids, labels),
        data_collator=LmCollator(PAD),
    )
    trainer.train()
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert all(torch.tensor(entry["loss"]).isfinite() for entry in trainer.state.log_history if "loss" in entry)


def test_an_optimiser_of_ones_own_trains_both_stages(tmp_path):
    model = fresh_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trainer = LteTrainer(
        model,
        arguments(tmp_path, recipe="annealed", calibration_tokens=0),
        train_dataset=toy_rows(),
        data_collator=LmCollator(PAD),
        optimizers=(optimizer, None),
    )
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert max(rates[4:]) > 0


def test_routers_that_were_trained_go_on_and_frozen_ones_stay(tmp_path):
    model = fresh_model()
    data = {"train_dataset": toy_rows(), "data_collator": LmCollator(PAD)}
    LteTrainer(model, arguments(tmp_path / "a"), **data).train()
    routers = {name: value.clone() for name, value in model.state_dict().items() if ".router." in name}
    for ffn in lte.sparse_ffns(model).values():
        ffn.router.requires_grad_(False)
    for recipe in ("annealed", "straight_through"):
        LteTrainer(model, arguments(tmp_path / recipe, recipe=recipe), **data).train()
        assert all(model.state_dict()[name].equal(value) for name, value in routers.items())
    trainer = LteTrainer(model.requires_grad_(True), arguments(tmp_path / "b", learning_rate=0.0), **data)
    trainer.train()
    # A fit would replace them; the thresholds are set.
    assert all(model.state_dict()[name].equal(value) for name, value in routers.items() if "weight" in name)


def test_what_cannot_be_is_refused_at_once(tmp_path):
    data = {"train_dataset": toy_rows(), "data_collator": LmCollator(PAD)}
    with pytest.raises(ValueError, match="model_init must be None"):
        LteTrainer(args=arguments(tmp_path), model_init=fresh_model, **data)
    own_loss = {"teacher": tiny_dense_model(), "compute_loss_func": lambda *args, **kwargs: 0}
    with pytest.raises(ValueError, match="compute_loss_func must be left at its default with a teacher"):
        LteTrainer(fresh_model(), arguments(tmp_path), **own_loss, **data)
    untokenised = datasets.Dataset.from_dict({"number": [1]})
    trainer = LteTrainer(fresh_model(), arguments(tmp_path), calibration_dataset=untokenised, **data)
    with pytest.raises(ValueError, match="rows must hold input_ids, got number"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_the_arguments_are_read_by_the_parsers_of_transformers():
    parsed = HfArgumentParser(LteTrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", "x", "--stage1_ratio", "0.25", "--recipe", "annealed", "--use_cpu", "true"]
    )[0]
    assert (parsed.stage1_ratio, parsed.recipe) == (0.25, "annealed")


def test_a_progress_bar_of_the_users_own_stays(tmp_path):
    class Own(ProgressCallback):
        pass

    own = Own()
    trainer = LteTrainer(
        fresh_model(), arguments(tmp_path), train_dataset=toy_rows(), data_collator=LmCollator(PAD), callbacks=[own]
    )
    assert own in trainer.callback_handler.callbacks


def test_checkpointed_activations_are_not_kept_with_the_logits(tmp_path):
    class Kept(TrainerCallback):
        seen: ClassVar[list] = []

        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.seen += [ffn.logits for ffn in lte.sparse_ffns(model).values()]

    trainer = LteTrainer(
        fresh_model(),
        arguments(tmp_path, gradient_checkpointing=True),
        train_dataset=toy_rows(),
        data_collator=LmCollator(PAD),
        callbacks=[Kept()],
    )
    trainer.train()
    assert Kept.seen == [None] * 16


def test_a_loader_of_ones_own_serves_without_a_data_set(tmp_path):
    class Loads(LteTrainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(toy_rows(), batch_size=8, collate_fn=LmCollator(PAD))

    trainer = Loads(fresh_model(0.4), arguments(tmp_path), data_collator=LmCollator(PAD))
    trainer.train()
    assert trainer.evaluate(toy_rows(64))["eval_sparsity"] == pytest.approx(0.4, abs=0.05)
    # Of several processes each has a loader of its own, and all take the batches of the first one, as many as it has.
    first = LmCollator(PAD)([toy_rows(1, seed=1)[0]])
    own, trainer.get_train_dataloader = trainer.get_train_dataloader, lambda: []
    trainer._of_first_process = lambda batch: first
    assert [batch["input_ids"].tolist() for batch in trainer._spread_batches(None, 64)] == [
        first["input_ids"].tolist()
    ] * 2
    trainer.get_train_dataloader, trainer._of_first_process = own, lambda batch: None
    assert not list(trainer._spread_batches(None, 64))


def test_data_that_cannot_train_are_refused(tmp_path):
    rows = toy_rows(16)
    unlabelled = TokenRows(rows.input_ids, [row * 0 - 100 for row in rows.labels])
    options = {"args": arguments(tmp_path), "data_collator": LmCollator(PAD)}
    with pytest.raises(ValueError, match="train_dataset must have labels other than -100, got none in rows"):
        LteTrainer(fresh_model(), train_dataset=unlabelled, **options).train()
    with pytest.raises(ValueError, match=r"must predict the next token from those before it, got model_type=.*bert"):
        LteTrainer(encoder_of_next_tokens(), train_dataset=rows, **options).train()


def encoder_of_next_tokens():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertLMHeadModel(BertConfig(vocab_size=VOCAB, **sizes))
    return lte.sparsify_(model, lte.LteConfig(expert_size=8, grouping="random"))
