"""The mixin over trainers of TRL: the real ones."""

import copy
from dataclasses import dataclass

import datasets
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import lte
from lte.data.rows import LmCollator
from lte.eval.sparsity import measure_sparsity
from lte.train.arguments import RoutingArguments
from lte.train.trainer import RoutingMixin
from tests.tiny_models import PAD, VOCAB, tiny_dense_model
from tests.train.test_trainer import fresh_model
from tests.train.toy import toy_rows


class LteSFTTrainer(RoutingMixin, SFTTrainer):
    pass


@dataclass
class LteSFTConfig(RoutingArguments, SFTConfig):
    pass


class LteDPOTrainer(RoutingMixin, DPOTrainer):
    pass


@dataclass
class LteDPOConfig(RoutingArguments, DPOConfig):
    pass


@pytest.fixture(scope="module")
def tokenizer():
    words = ["[PAD]", "[EOS]", "[UNK]", *(f"w{i}" for i in range(3, VOCAB))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[EOS]", unk_token="[UNK]", pad_token="[PAD]")


def texts(count=64, seed=0):
    rows = toy_rows(count, seed=seed).input_ids
    return datasets.Dataset.from_dict({"text": [" ".join(f"w{token}" for token in row) for row in rows]})


def settings(folder, **options):
    shared = {"max_steps": 16, "per_device_train_batch_size": 8, "learning_rate": 3e-3, "logging_steps": 1}
    shared |= {"router_fit_tokens": 512, "calibration_tokens": 4096, "report_to": "none", "use_cpu": True}
    return {"output_dir": str(folder), "save_strategy": "no", "bf16": False, **shared, **options}


def sft(model, tokenizer, folder, *, trainer_options=None, **options):
    return LteSFTTrainer(
        model,
        LteSFTConfig(**settings(folder, **options)),
        train_dataset=texts(),
        eval_dataset=texts(16, seed=5),
        processing_class=tokenizer,
        **(trainer_options or {}),
    )


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}])
def test_sft_trains_routers_and_meets_the_target(tmp_path, tokenizer, options):
    model = fresh_model(0.4)
    start = copy.deepcopy(model.state_dict())
    trainer = sft(model, tokenizer, tmp_path, **options)
    trainer.train()
    assert not any(value.equal(start[name]) for name, value in model.state_dict().items())
    held_out = [LmCollator(PAD)([toy_rows(256, seed=9)[i] for i in range(256)])]
    assert measure_sparsity(model, held_out).sparsity == pytest.approx(0.4, abs=0.03)
    entries = [entry for entry in trainer.state.log_history if "active_fraction" in entry]
    assert [entry["stage"] for entry in entries] == [1] * 8 + [2] * 8
    # What TRL logs itself is there, too.
    assert all("mean_token_accuracy" in entry for entry in entries)
    assert 0.3 < trainer.evaluate()["eval_sparsity"] < 0.5


def test_sft_with_adapters_keeps_the_routers_with_them(tmp_path, tokenizer):
    model, ids = fresh_model(), torch.arange(3, 35)[None]
    before = model.eval()(ids).logits
    peft_config = LoraConfig(r=4, target_modules=["gate_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM")
    trainer = sft(model, tokenizer, tmp_path, trainer_options={"peft_config": peft_config})
    trainer.train()
    trained = trainer.model.eval()
    with trained.disable_adapter():
        assert trained(ids).logits.equal(before)
    assert not torch.allclose(trained(ids).logits, before, atol=1e-3)
    trainer.save_model(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum("router.weight" in name for name in saved) == 2


def test_sft_distils_from_a_teacher(tmp_path, tokenizer):
    teacher = tiny_dense_model()
    trainer = sft(fresh_model(0.1), tokenizer, tmp_path, trainer_options={"teacher": teacher})
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "distillation_loss" in entry]
    assert len(entries) == 16
    assert entries[-1]["distillation_loss"] < max(entry["distillation_loss"] for entry in entries)
    assert all(0 < entry["active_fraction"] <= 1 for entry in entries)


def test_dpo_trains_routers(tmp_path, tokenizer):
    rows = texts(32)["text"]
    pairs = {"prompt": [row[:20] for row in rows], "chosen": [row[20:60] for row in rows], "rejected": rows[::-1]}
    model = fresh_model()
    start = copy.deepcopy(model.state_dict())
    trainer = LteDPOTrainer(
        model,
        ref_model=copy.deepcopy(model),
        args=LteDPOConfig(**settings(tmp_path, max_steps=4, per_device_train_batch_size=4)),
        train_dataset=datasets.Dataset.from_dict(pairs),
        processing_class=tokenizer,
    )
    trainer.train()
    changed = {name for name, value in model.state_dict().items() if not value.equal(start[name])}
    assert {name for name in start if ".router." in name} <= changed
    entries = [entry for entry in trainer.state.log_history if "active_fraction" in entry]
    assert [entry["stage"] for entry in entries] == [1, 1, 2, 2]
    assert all("rewards/chosen" in entry and torch.tensor(entry["loss"]).isfinite() for entry in entries)
    assert {ffn.mode for ffn in lte.sparse_ffns(model).values()} == {"hard"}


def test_a_teacher_over_preferences_is_refused(tmp_path, tokenizer):
    rows = texts(8)["text"]
    model = fresh_model()
    trainer = LteDPOTrainer(
        model,
        ref_model=copy.deepcopy(model),
        args=LteDPOConfig(**settings(tmp_path, max_steps=2, per_device_train_batch_size=4)),
        train_dataset=datasets.Dataset.from_dict({"prompt": rows, "chosen": rows, "rejected": rows[::-1]}),
        processing_class=tokenizer,
        teacher=tiny_dense_model(),
    )
    with pytest.raises(ValueError, match="teacher must be None for LteDPOTrainer"):
        trainer.train()
