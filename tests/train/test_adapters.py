"""LoRA through peft: routers train as a whole beside the adapters and are saved with them."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lte
from lte.data.rows import LmCollator
from lte.eval.sparsity import measure_sparsity
from lte.nn.wrapped_ffn import numbers_in_4_bits
from lte.train.adapters import merge_lora, with_lora
from lte.train.compilation import compiled_layers
from lte.train.config import TrainConfig
from lte.train.trainer import LteTrainer
from lte.train.two_stage import train_two_stage
from tests.tiny_models import PAD, VOCAB, tiny_dense_model
from tests.train.test_trainer import arguments, fresh_model
from tests.train.toy import toy_rows

IDS = torch.arange(3, 35)[None]


def lora(**options):
    targets = ["gate_proj", "up_proj", "down_proj", "q_proj"]
    return LoraConfig(**{"r": 4, "target_modules": targets, "task_type": "CAUSAL_LM", **options})


def logits_of(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def train(model, folder, **options):
    settings = {"max_steps": 16, "calibration_tokens": 8192, "learning_rate": 1e-2}
    peft_config = options.pop("peft_config", None)
    trainer = LteTrainer(
        model,
        arguments(folder, **{**settings, **options}),
        train_dataset=toy_rows(256),
        data_collator=LmCollator(PAD),
        peft_config=peft_config,
    )
    trainer.train()
    return trainer


@pytest.fixture
def base(tmp_path):
    """A converted, untrained model and the folder that it is saved in."""
    model = fresh_model()
    model.save_pretrained(tmp_path / "base")
    return model, tmp_path / "base"


def test_adapters_and_whole_routers_train_and_nothing_else(base, tmp_path):
    model = get_peft_model(base[0], lora())
    start = copy.deepcopy(model.state_dict())
    trainer = train(model, tmp_path / "run")
    changed = {name for name, value in model.state_dict().items() if name in start and not value.equal(start[name])}
    assert changed == {name for name in start if "lora_" in name}
    added = {name for name in model.state_dict() if name not in start}
    assert {name.split(".router.")[1] for name in added} == {
        "modules_to_save.default.weight",
        "modules_to_save.default.bias",
        "original_module.weight",
        "original_module.bias",
    }
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert not any("lora_" in name or "modules_to_save" in name for name in frozen)
    assert all("lora_" in name or "modules_to_save" in name for name in set(dict(model.named_parameters())) - frozen)
    held_out = [LmCollator(PAD)([toy_rows(256, seed=9)[i] for i in range(256)])]
    assert measure_sparsity(model, held_out).sparsity == pytest.approx(0.5, abs=0.02)
    assert trainer.evaluate(toy_rows(64, seed=9))["eval_sparsity"] == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("way", ["before", "argument"])
def test_base_and_adapter_give_the_trained_logits_bit_for_bit(base, tmp_path, way):
    model, folder = base
    before = logits_of(model)
    if way == "before":
        trainer = train(get_peft_model(model, lora()), tmp_path / "run")
    else:
        trainer = train(model, tmp_path / "run", peft_config=lora())
    trained = trainer.model
    expected = logits_of(trained)
    assert not torch.allclose(expected, before)
    trained.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    assert logits_of(loaded).equal(expected)
    with loaded.disable_adapter():
        assert logits_of(loaded).equal(before)
    assert logits_of(loaded).equal(expected)


def test_checkpoints_hold_the_routers_and_training_resumes_from_them(base, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 6}
    whole = train(get_peft_model(copy.deepcopy(base[0]), lora()), tmp_path / "run", **options).model
    again = get_peft_model(base[0], lora())
    trainer = LteTrainer(
        again,
        arguments(tmp_path / "run", max_steps=16, calibration_tokens=8192, learning_rate=1e-2, **options),
        train_dataset=toy_rows(256),
        data_collator=LmCollator(PAD),
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    for name, value in whole.state_dict().items():
        assert value.equal(again.state_dict()[name]), name


def test_a_merged_model_is_an_ordinary_lte_folder_on_the_kernels(base, tmp_path):
    trained = train(get_peft_model(base[0], lora()), tmp_path / "run").model
    expected = logits_of(trained)
    merged = trained.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {name.rsplit(".", 1)[0].rsplit(".", 1)[-1] for name in loaded.state_dict() if "router" in name} == {"router"}
    assert logits_of(loaded).equal(logits_of(merged))
    lte.accelerate_(loaded)
    torch.testing.assert_close(logits_of(loaded), expected, rtol=1e-3, atol=1e-4)


def test_several_adapters_have_routers_of_their_own(base, tmp_path):
    model = get_peft_model(base[0], lora(), adapter_name="first")
    train(model, tmp_path / "first")
    first = logits_of(model)
    model.add_adapter("second", lora())
    model.set_adapter("second")
    train(model, tmp_path / "second", learning_rate=5e-3)
    second = logits_of(model)
    assert not torch.allclose(first, second)
    model.set_adapter("first")
    assert logits_of(model).equal(first)
    model.set_adapter("second")
    assert logits_of(model).equal(second)


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2", "opt"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_adapters_before_the_conversion_keep_their_function(model_type, options):
    targets = {"llama": ["gate_proj", "up_proj", "down_proj"], "phi3": ["gate_up_proj", "down_proj"],
               "gpt2": ["c_fc", "c_proj"], "opt": ["fc1", "fc2"]}[model_type]  # fmt: skip
    model = get_peft_model(
        tiny_dense_model(model_type), lora(target_modules=targets, fan_in_fan_out=model_type == "gpt2", **options)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    before = logits_of(model)
    assert lte.sparsify_(model, lte.LteConfig(expert_size=8, grouping="random")) is model
    torch.testing.assert_close(logits_of(model), before, rtol=1e-4, atol=1e-5)
    assert model.config.lte["name"] == "lte"
    with model.disable_adapter():
        assert not torch.allclose(logits_of(model), before, atol=1e-4)


def test_adapters_before_the_conversion_train(tmp_path):
    model = lte.sparsify_(get_peft_model(tiny_dense_model(), lora()), lte.LteConfig(expert_size=8, grouping="random"))
    train(model, tmp_path)
    assert {name.split("modules_to_save.default.")[1] for name, p in model.named_parameters() if p.requires_grad
            and "router" in name} == {"weight", "bias"}  # fmt: skip
    assert all(p.requires_grad == ("lora_" in n or "modules_to_save" in n) for n, p in model.named_parameters())


@pytest.mark.parametrize("in_4_bits", [False, True])
def test_the_settings_of_lte_train_keep_base_and_adapter_and_merge_them(tmp_path, in_4_bits):
    torch.manual_seed(0)
    # bitsandbytes takes blocks of 64.
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, pad_token_id=PAD, **sizes))
    lte.sparsify_(model, lte.LteConfig(expert_size=8, grouping="random", target_sparsity=0.4))
    start = copy.deepcopy(model.state_dict())
    config = TrainConfig(lora_rank=4, lora_4bit=in_4_bits, stage1_steps=12, stage2_steps=12, learning_rate=1e-2,
                         router_fit_tokens=512, calibration_tokens=4096, report_to="none")  # fmt: skip
    adapted = with_lora(model, config, tmp_path)
    train_two_stage(adapted, toy_rows(256), config, tmp_path / "checkpoints")
    trained = logits_of(adapted)
    inner = adapted.get_base_model().model.layers[1].mlp.up_proj
    base_weight = numbers_in_4_bits(inner.base_layer) if in_4_bits else inner.base_layer.weight.clone()
    weight = base_weight + inner.get_delta_weight("default")
    merged = merge_lora(adapted, model, tmp_path)
    torch.testing.assert_close(merged.model.layers[1].mlp.up_proj.weight, weight, rtol=1e-5, atol=1e-6)
    # Bitsandbytes rounds what it multiplies with weights in 4 bits on a CPU.
    off = (logits_of(merged) - trained).norm() / trained.norm()
    assert off < (5e-2 if in_4_bits else 1e-5)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert all(value.equal(start[name]) for name, value in base.state_dict().items())
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert loaded.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    if not in_4_bits:
        torch.testing.assert_close(logits_of(loaded.merge_and_unload()), logits_of(merged), rtol=1e-5, atol=1e-6)


def test_weights_in_4_bits_that_a_family_stores_the_other_way_round_are_merged(tmp_path):
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 32}
    tokens = {"vocab_size": VOCAB, "bos_token_id": PAD, "eos_token_id": PAD}
    model = lte.sparsify_(GPT2LMHeadModel(GPT2Config(**sizes, **tokens)), lte.LteConfig(expert_size=8))
    start = {name: weight.clone() for name, weight in model.named_parameters()}
    adapted = with_lora(model, TrainConfig(lora_rank=4, lora_4bit=True), tmp_path)
    merged = merge_lora(adapted, model, tmp_path).transformer.h[0]
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        found, before = merged.get_submodule(name).weight, start[f"transformer.h.0.{name}.weight"]
        assert 0 < (found - before).norm() < 0.2 * before.norm()


def test_what_other_methods_train_is_kept_with_the_adapter(tmp_path):
    model = lte.sparsify_(tiny_dense_model(), lte.NoisyTopkConfig(expert_size=8, grouping="random"))
    trainer = train(get_peft_model(model, lora()), tmp_path, recipe="method", max_steps=4)
    own = {name.rsplit(".", 1)[0].split(".mlp.")[1] for name, p in trainer.model.named_parameters()
           if p.requires_grad and "lora_" not in name}  # fmt: skip
    assert own == {"router.modules_to_save.default", "noise_router.modules_to_save.default"}


def test_adapters_of_another_kind_are_refused(tmp_path):
    model = fresh_model()
    model.add_adapter(lora(task_type=None))
    with pytest.raises(ValueError, match=r"model must have its adapters from peft\.get_peft_model"):
        LteTrainer(model, arguments(tmp_path), train_dataset=toy_rows())


def test_a_resumed_run_takes_the_base_that_is_there(tmp_path):
    config = TrainConfig(lora_rank=4)
    first = fresh_model()
    with_lora(first, config, tmp_path)
    torch.manual_seed(1)
    other = lte.sparsify_(tiny_dense_model(), lte.LteConfig(expert_size=8, grouping="random", seed=7))
    before = logits_of(fresh_model())
    adapted = with_lora(other, config, tmp_path)
    weights = [ffn.part("down_proj").base_layer.weight for ffn in lte.sparse_ffns(adapted).values()]
    kept = [ffn.part("down_proj").weight for ffn in lte.sparse_ffns(fresh_model()).values()]
    assert all(one.equal(two) for one, two in zip(weights, kept, strict=True))
    torch.testing.assert_close(logits_of(adapted), before, rtol=1e-5, atol=1e-6)


def test_a_teacher_of_another_depth_is_compiled_too(tmp_path):
    student = get_peft_model(fresh_model(), lora())
    config = copy.deepcopy(tiny_dense_model().config)
    config.num_hidden_layers = 1
    teacher = type(tiny_dense_model())(config)
    compiled = []
    with compiled_layers(student.get_base_model(), teacher, True):
        layers = [*student.get_base_model().model.layers, *teacher.model.layers]
        compiled = [layer._compiled_call_impl is not None for layer in layers]
    assert compiled == [True] * 3
    assert all(layer._compiled_call_impl is None for layer in layers)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({}, "lora_rank must be given with lora_4bit"), ({"lora_rank": 4, "compile": True}, "compile must be off")],
)
def test_settings_that_weights_in_4_bits_cannot_have(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(lora_4bit=True, **settings)
