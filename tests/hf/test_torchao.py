"""LTE models that torchao quantised decode by whole steps, which read its bits."""

from __future__ import annotations

import copy
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TorchAoConfig

import lte
from lte.hf.acceleration import describe_kernels, is_accelerated
from lte.hf.decoder import NoPlanError, decoder_plan, same_memory
from lte.hf.stepping import has_engine
from lte.hf.threshold import set_threshold_
from lte.nn.sparse_ffn import SparseFfn
from lte.nn.torchao_weights import quantized_matrix
from lte.ops.step import cuda
from lte.ops.step.plan import DecoderPlan, Quantized
from lte.ops.step.reference import ReferenceEngine
from tests.hf.step_models import STEP_TYPES, step_model, take_reference_engines
from tests.ops.step_emulator import Emulator
from tests.ops.step_plans import copied, new_caches, step_inputs

quantization = pytest.importorskip("torchao.quantization")

INT8 = quantization.Int8WeightOnlyConfig()
KINDS: dict[str, Any] = {
    "int8": INT8,
    "int8 of intx": quantization.IntxWeightOnlyConfig(weight_dtype=torch.int8),
    "int4": quantization.IntxWeightOnlyConfig(
        weight_dtype=torch.int4,
        granularity=quantization.PerGroup(16),
        mapping_type=quantization.MappingType.ASYMMETRIC,
    ),
    "int4 without zeros": quantization.IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=quantization.PerGroup(32)
    ),
}
GREEDY: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[DecoderPlan]:
    """The plans of all engines, which are the reference."""
    return take_reference_engines(monkeypatch)


def quantized_model(config: Any, model_type: str = "llama", **overrides: Any) -> Any:
    model = step_model(model_type, **overrides)
    quantization.quantize_(model, config)
    return model


def prompt() -> dict[str, Tensor]:
    ids = torch.randint(3, 99, (2, 6), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def matrices(plan: DecoderPlan) -> dict[str, Any]:
    """All matrices of a plan as torchao has them: [outputs, inputs]."""
    found = {"head": plan.head}
    for index, layer in enumerate(plan.layers):
        found |= {f"{index}.{name}": getattr(layer, name) for name in ("q", "k", "v", "out", "gate", "up", "down")}
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_has_the_numbers_of_torchao(kind: str, dtype: torch.dtype) -> None:
    model = step_model().to(dtype)
    quantization.quantize_(model, KINDS[kind])
    plan = decoder_plan(lte.accelerate_(model))
    names = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "out": "self_attn.o_proj"}
    names |= {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    for name, matrix in matrices(plan).items():
        index, _, role = name.partition(".")
        linear: Any = model.lm_head if name == "head" else model.model.layers[int(index)].get_submodule(names[role])
        assert isinstance(matrix, Quantized)
        assert matrix.bits == (8 if "int8" in kind else 4)
        assert (matrix.zeros is not None) == (kind == "int4")
        assert matrix.scales.dtype == (torch.float32 if matrix.bits == 8 else dtype)
        expected = linear.weight.dequantize().float()
        found = matrix.dense(torch.float32)
        difference = (found.T if role == "down" else found) - expected
        # torchao rounds to bf16 what it multiplies; of 4 bits the scales are rounded, too.
        bound = 1e-6 if dtype == torch.float32 else 2**-6
        assert difference.abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", STEP_TYPES)
def test_generate_takes_whole_steps(model_type: str, kind: str, made: list[DecoderPlan]) -> None:
    model = quantized_model(KINDS[kind], model_type)
    plain = model.generate(**prompt(), **GREEDY)
    assert not made
    fast = lte.accelerate_(model).generate(**prompt(), **GREEDY)
    assert torch.equal(fast, plain)
    assert has_engine(model)
    assert len(made) == 1
    assert isinstance(made[0].head, Quantized)
    assert made[0].layers[0].router is not None
    # The next call meets the same memory, and no other engine.
    model.generate(**prompt(), **GREEDY)
    assert len(made) == 1


def test_switching_there_and_back(made: list[DecoderPlan]) -> None:
    model = quantized_model(INT8)
    assert lte.accelerate_(lte.accelerate_(model)) is model
    assert is_accelerated(model)
    assert describe_kernels(model) == {"weights": "torchao", "decode": "torchao", "prefill": "torchao"}
    assert is_accelerated(copy.deepcopy(model))
    before = model.lm_head.weight
    lte.decelerate_(model)
    assert not is_accelerated(model)
    assert describe_kernels(model) is None
    assert {type(ffn) for ffn in lte.sparse_ffns(model).values()} == {SparseFfn}
    model.generate(**prompt(), **GREEDY)
    assert not made
    assert model.lm_head.weight is before


def test_plans_share_the_memory_of_torchao() -> None:
    model = lte.accelerate_(quantized_model(INT8))
    one, other = decoder_plan(model), decoder_plan(model)
    assert same_memory(one, other)
    assert isinstance(one.head, Quantized)
    assert one.head.values.data_ptr() == model.lm_head.weight.qdata.data_ptr()
    linear: Any = model.model.layers[1].mlp.down_proj
    linear.weight = nn.Parameter(linear.weight.data.clone(), requires_grad=False)
    assert not same_memory(one, decoder_plan(model))


def test_attention_and_head_alone(made: list[DecoderPlan]) -> None:
    model = step_model()
    quantization.quantize_(model, INT8, filter_fn=lambda module, name: type(module) is nn.Linear and "mlp" not in name)
    plain = model.generate(**prompt(), **GREEDY)
    assert torch.equal(lte.accelerate_(model).generate(**prompt(), **GREEDY), plain)
    layer = made[0].layers[0]
    assert isinstance(layer.q, Quantized)
    assert isinstance(layer.up, Tensor)


def test_folders_that_transformers_quantises(made: list[DecoderPlan], tmp_path: Path) -> None:
    step_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=TorchAoConfig(INT8))
    plain = model.generate(**prompt(), **GREEDY)
    assert torch.equal(lte.accelerate_(model).generate(**prompt(), **GREEDY), plain)
    assert isinstance(made[0].layers[1].down, Quantized)
    # It leaves a head that is the embedding as it is.
    assert isinstance(made[0].head, Tensor)
    assert made[0].head.data_ptr() == made[0].embedding.data_ptr()


def test_ffns_that_are_quantised_in_part_are_refused() -> None:
    model = step_model()
    quantization.quantize_(model, INT8, filter_fn=lambda module, name: name.endswith("up_proj"))
    with pytest.raises(ValueError, match=r"up_proj must be a plain floating-point nn.Linear.*quantisation"):
        lte.accelerate_(model)


def test_int8_on_top_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weights must be native, as torchao quantised those of .*mlp, got .*int8"):
        lte.accelerate_(quantized_model(INT8), "int8")


def test_what_whole_steps_do_not_read(made: list[DecoderPlan]) -> None:
    model = quantized_model(quantization.Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(NoPlanError, match="holds an Int8Tensor that quantises its input, too"):
        decoder_plan(lte.accelerate_(model))
    with pytest.warns(RuntimeWarning, match=r"module by module .* quantises its input, too"):
        model.generate(**prompt(), **GREEDY)
    two_bits = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int2, granularity=quantization.PerGroup(32))
    with pytest.raises(NoPlanError, match=r"holds weights of torch.int2, of neither 4 nor 8 bits"):
        decoder_plan(lte.accelerate_(quantized_model(two_bits)))
    groups = quantization.Int8WeightOnlyConfig(granularity=quantization.PerGroup(16))
    with pytest.raises(NoPlanError, match=r"holds 8-bit weights without one scale for each output"):
        decoder_plan(lte.accelerate_(quantized_model(groups)))


def test_other_modes_are_for_modules(made: list[DecoderPlan]) -> None:
    model = lte.accelerate_(quantized_model(INT8))
    for ffn in lte.sparse_ffns(model).values():
        ffn.set_mode("dense")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(**prompt(), **GREEDY)
    assert not made


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("kind", ["int8", "int4 without zeros", "int4 of a GPU's groups"])
def test_the_kernel_of_gpus_computes_such_plans(kind: str, tmp_path: Path) -> None:
    grouped = quantization.IntxWeightOnlyConfig(
        weight_dtype=torch.int4,
        granularity=quantization.PerGroup(64),
        mapping_type=quantization.MappingType.ASYMMETRIC,
    )
    model = quantized_model(KINDS.get(kind, grouped), head_dim=16, hidden_size=64)
    plan = decoder_plan(lte.accelerate_(model))
    machine = Emulator(blocks=5, threads=64, shared_bytes=80000, folder=tmp_path)
    caches = new_caches(plan, 2, 8)
    assert cuda.unfit_shapes(plan, caches, machine) is None
    step, reference = cuda.CudaEngine(plan, machine).bind(caches), ReferenceEngine(plan).bind(copied(caches))
    for index in range(6):
        inputs = step_inputs(plan, 2, index, [0, 1])
        expected = reference(*inputs)
        assert (step(*inputs) - expected).square().mean().sqrt() <= 1e-5 * expected.square().mean().sqrt()


def test_half_bytes_of_plain_int4() -> None:
    from torchao.quantization.quantize_.workflows.int4.int4_tensor import Int4Tensor

    values = torch.randint(-8, 8, (6, 64), dtype=torch.int8)
    scales, zeros = torch.rand(2, 6, 2)
    bytes_ = (values[:, ::2] & 15) | (values[:, 1::2] << 4)
    weight = Int4Tensor(bytes_, scales.T.contiguous(), zeros.T.contiguous(), [1, 32], torch.Size((6, 64)))
    for transposed in (False, True):
        found = quantized_matrix(weight, torch.float32, transposed=transposed)
        dense = found.dense(torch.float32)
        expected = values * scales.repeat_interleave(32, 1) + zeros.repeat_interleave(32, 1)
        assert torch.allclose(dense.T if transposed else dense, expected, atol=1e-6)
        assert (found.bits, found.group) == (4, 32)


def test_int4_tiles_are_read_through_their_product(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchao.quantization.quantize_.workflows.int4.int4_tile_packed_to_4d_tensor import Int4TilePackedTo4dTensor
    from torchao.quantization.utils import pack_tinygemm_scales_and_zeros

    # 12 outputs and 96 inputs that are filled up to 16 and 128, as torchao does.
    values, groups = torch.randint(0, 16, (12, 96)), 4
    scales, zeros = (torch.rand(2, 16, groups) + 0.1).bfloat16()
    spread = [each[:12, :3].float().repeat_interleave(32, 1) for each in (scales, zeros)]
    dense = (values - 8) * spread[0] + spread[1]
    pairs = pack_tinygemm_scales_and_zeros(scales, zeros, torch.bfloat16)
    weight = Int4TilePackedTo4dTensor(torch.zeros(1, dtype=torch.int32), pairs, [1, 32], torch.Size((12, 96)))
    # The kernel that multiplies by them is a GPU's.
    product = lambda x, w: (x.float() @ dense.T).bfloat16()  # noqa: E731
    monkeypatch.setattr("lte.nn.torchao_weights.functional.linear", product)
    found = quantized_matrix(weight, torch.bfloat16)
    assert torch.equal(found.values, (values - 8).to(torch.int8))
    assert torch.allclose(found.dense(torch.float32), dense)
    assert torch.equal(quantized_matrix(weight, torch.bfloat16, transposed=True).values, found.values.T)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_tiles_on_a_gpu(group: int) -> None:
    linear = nn.Linear(1536, 256, bias=False, device="cuda", dtype=torch.bfloat16)
    before, x = linear.weight.detach().float(), torch.randn(3, 1536, device="cuda", dtype=torch.bfloat16)
    config = quantization.Int4WeightOnlyConfig(group_size=group, int4_packing_format="tile_packed_to_4d")
    quantization.quantize_(linear, config)
    matrix = quantized_matrix(linear.weight, torch.bfloat16)
    assert (matrix.bits, matrix.group) == (4, group)
    dense = matrix.dense(torch.float32)
    assert (dense - before).abs().max() <= 0.6 * matrix.scales.float().max() + 0.01 * before.abs().max()
    expected = linear(x).float()
    assert (x.float() @ dense.T - expected).square().mean().sqrt() <= 0.01 * expected.square().mean().sqrt()


def test_an_assistant_that_is_quantised_too(made: list[DecoderPlan]) -> None:
    model, other = (lte.accelerate_(quantized_model(INT8)) for _ in range(2))
    assistant = set_threshold_(other, 0.7)
    one = {name: rows[:1] for name, rows in prompt().items()}
    assert torch.equal(model.generate(**one, assistant_model=assistant, **GREEDY), model.generate(**one, **GREEDY))
    assert has_engine(model)
    assert has_engine(assistant)
