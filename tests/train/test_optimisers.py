"""Optimisers with a narrow state, weights in bf16, and routers that stay in fp32 in both."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback
from transformers.training_args import OptimizerNames

import lte
from lte.cli.train_watcher import MEMORY_HINT
from lte.train import narrow_adam, optimisers
from lte.train.arguments import LteTrainingArguments
from lte.train.config import TrainConfig
from lte.train.optimisers import (
    OPTIMISERS,
    cast_weights_,
    keep_routers_wide_,
    optimiser_arguments,
    warn_of_lost_steps,
)
from lte.train.trainer import LteTrainer
from lte.train.two_stage import train_two_stage, training_arguments
from tests.tiny_models import tiny_dense_model
from tests.train.toy import toy_rows, trainer_of


def needing(name: str) -> Any:
    """A parameter of a test that is skipped where the optimiser's package is not installed."""
    package = OPTIMISERS[name].package
    missing = package is not None and find_spec(package) is None
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=f"needs {package} (pip install {package})"))


@pytest.fixture
def alone() -> Iterator[DeviceMesh]:
    """A mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


ALL = [needing(name) for name in OPTIMISERS]
NARROW = [needing(name) for name, optimiser in OPTIMISERS.items() if optimiser.package]
needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao (pip install torchao)")


COMPILE = torch.compile


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs what torchao compiles as it is: on a CPU each shape takes seconds to compile."""
    monkeypatch.setattr(torch, "compile", lambda function, *args, **kwargs: function)


class Moments(TrainerCallback):
    """The moments of the routers and of all other parameters, by name, after the last step."""

    def on_train_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.of = {id(parameter): found for parameter, found in optimizer.state.items()}


def config(**options: Any) -> TrainConfig:
    sizes = {"stage1_steps": 12, "stage2_steps": 12, "batch_size": 8, "learning_rate": 3e-3, "report_to": "none"}
    return TrainConfig(**{**sizes, "router_fit_tokens": 512, "calibration_tokens": 1024, **options})


def model_of() -> Any:
    # Routers of 4096 weights: smaller ones would have wide moments by themselves.
    model = tiny_dense_model(hidden_size=128, head_dim=32, intermediate_size=512)
    return lte.sparsify_(model, lte.LteConfig(expert_size=8, grouping="contiguous", target_sparsity=0.4))


def element_bytes(state: dict[str, Any], numel: int) -> float:
    """Bytes for each number of a parameter, of both its moments."""

    def stored(value: Any) -> int:
        parts = [getattr(value, name) for name in getattr(value, "tensor_attrs", ())]
        return sum(map(stored, parts)) if parts else value.nbytes

    tensors = [value for name, value in state.items() if torch.is_tensor(value) and "map" not in name and value.ndim]
    maps = [part for value in tensors for part in [getattr(value, "qmap", None)] if part is not None]
    return (sum(map(stored, tensors)) - sum(part.nbytes for part in maps)) / numel


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_are_as_narrow_as_the_table_says_and_wide_for_routers(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    model = model_of()
    cast_weights_(model, dtype)
    moments = Moments()
    arguments = lte.LteTrainingArguments(
        str(tmp_path),
        max_steps=4,
        optim=name,
        per_device_train_batch_size=4,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        router_fit_tokens=128,
        calibration_tokens=0,
    )
    trainer = LteTrainer(
        model,
        arguments,
        train_dataset=toy_rows(16, 16),
        data_collator=lte.data.rows.LmCollator(0),
        callbacks=[moments],
    )
    trainer.train()
    optimiser = OPTIMISERS[name]
    for path, parameter in model.named_parameters():
        found = element_bytes(moments.of[id(parameter)], parameter.numel())
        if ".router." in path:
            assert parameter.dtype == torch.float32
            assert found == 8
        elif path.endswith("gate_proj.weight"):
            assert parameter.dtype == dtype
            assert found == pytest.approx(optimiser.moment_bytes or 2 * parameter.itemsize, rel=0.01)
        elif "embed_tokens" in path and optimiser.wide_embeddings:
            assert found == 8


def test_what_one_optimiser_keeps_wide_is_narrow_in_the_next() -> None:
    optim = pytest.importorskip("bitsandbytes").optim
    sparse, other = model_of(), nn.Linear(128, 64, bias=False)
    routers = [parameter for name, parameter in sparse.named_parameters() if ".router." in name]
    for model, parameters in ((sparse, routers), (other, [other.weight])):
        optimizer = optim.AdamW8bit(parameters)
        keep_routers_wide_(optimizer, model, routers)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert optimizer.state[other.weight]["state1"].dtype == torch.uint8


@needs_torchao
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit"])
def test_faster_steps_are_those_of_torchao(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    kind = getattr(importlib.import_module("torchao.optim"), name)
    fast = narrow_adam.with_fast_steps(kind)
    calls: list[int] = []
    function = fast._function
    monkeypatch.setattr(fast, "_function", staticmethod(lambda p, *args: [calls.append(p.numel()), function(p, *args)]))
    shapes = [(64, 64), (30,), (7, 11), (32, 128), (20, 64), (20,)]
    found = []
    for each in (kind, fast):
        torch.manual_seed(0)
        dtypes = [torch.bfloat16] * 3 + [torch.float32] * 3
        parameters = [
            nn.Parameter(torch.randn(*shape, dtype=dtype)) for shape, dtype in zip(shapes, dtypes, strict=True)
        ]
        groups = [{"params": parameters[:3]}, {"params": parameters[3:], "weight_decay": 0.0, "lr": 0.01}]
        optimizer = each(groups, block_size=256)
        for step in range(4):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            if step == 2:
                parameters[1].grad = None
            optimizer.step()
        moments = [value["exp_avg"] for value in optimizer.state.values()]
        found.append([*parameters, *(each.dequantize() if hasattr(each, "codes") else each for each in moments)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    # Once all small ones of a group and a dtype are one, but for those that have taken other numbers of steps.
    assert calls[:4] == [64 * 64, 32 * 128, 30 + 77, 20 * 64 + 20]
    assert calls[-5:] == [64 * 64, 32 * 128, 30, 77, 20 * 64 + 20]
    # As of Trainer, on the class.
    arguments = LteTrainingArguments(optim=f"adamw_torch_{name[5]}bit", use_cpu=True)
    chosen, _ = LteTrainer.get_optimizer_cls_and_kwargs(arguments)
    assert issubclass(chosen, narrow_adam._FastSteps)
    # Another version of torchao's function is left to torchao, and so is another optimiser.
    monkeypatch.setattr("torchao.optim.adam.single_param_adam", lambda p, grad: None)
    narrow_adam.with_fast_steps.cache_clear()
    assert narrow_adam.with_fast_steps(kind) is kind
    assert narrow_adam.with_fast_steps(torch.optim.AdamW) is torch.optim.AdamW
    narrow_adam.with_fast_steps.cache_clear()


@needs_torchao
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit"])
def test_faster_steps_of_tensors_in_shards_are_those_of_plain_ones(
    monkeypatch: pytest.MonkeyPatch, alone: DeviceMesh, name: str, dtype: torch.dtype
) -> None:
    """Traced as for compilation, which looks into the moments, and with moments out of a checkpoint."""
    monkeypatch.setattr(torch, "compile", functools.partial(COMPILE, backend="eager"))
    kind = narrow_adam.with_fast_steps(getattr(importlib.import_module("torchao.optim"), name))
    found = []
    for shards in (False, True):
        torch.manual_seed(0)
        tensors = [torch.randn(*shape, dtype=dtype) for shape in ((64, 64), (30,), (0, 8), (20,))]
        if shards:
            tensors = [distribute_tensor(tensor, alone, [Shard(0)]) for tensor in tensors]
        parameters = [nn.Parameter(tensor) for tensor in tensors]
        optimizer = kind(parameters, lr=0.01, bf16_stochastic_round=True)
        for step in range(4):
            torch.manual_seed(step)
            for parameter, tensor in zip(parameters, tensors, strict=True):
                grad = torch.randn(tensor.shape, dtype=dtype)
                parameter.grad = distribute_tensor(grad, alone, [Shard(0)]) if shards else grad
            if step == 2:
                state = optimizer.state_dict()
                optimizer = kind(parameters, lr=0.01, bf16_stochastic_round=True)
                optimizer.load_state_dict(state)
            optimizer.step()
        narrow = [optimizer.state[parameters[0]][moment] for moment in ("exp_avg", "exp_avg_sq")]
        assert [isinstance(moment, DTensor) for moment in narrow] == [shards] * 2
        moments = [moment.to_local() if shards else moment for moment in narrow]
        found.append([*(each.full_tensor() if shards else each for each in parameters), *moments])
        assert all(hasattr(moment, "codes") for moment in moments)
    for one, other in zip(*found, strict=True):
        assert torch.equal(*(each.dequantize() if hasattr(each, "codes") else each for each in (one, other)))


def test_the_names_are_those_of_trainer() -> None:
    assert OPTIMISERS.keys() <= {each.value for each in OptimizerNames}


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_they_train_as_adam_does(tmp_path: Path, name: str, weights: str) -> None:
    losses = []
    for optim, dtype in ((None, "float32"), (name, weights)):
        torch.manual_seed(0)
        settings = config(optim=optim, weights_dtype=dtype, logging_steps=6)
        summary = train_two_stage(model_of(), toy_rows(256), settings, tmp_path / str(optim))
        losses.append([entry["task_loss"] for entry in summary.log_history if "task_loss" in entry])
    assert losses[0][-1] < 0.8 * losses[0][0]
    assert losses[1][-1] == pytest.approx(losses[0][-1], rel=0.05)


@pytest.mark.parametrize(("optim", "moves"), [("adamw_torch", False), pytest.param(None, True, marks=needs_torchao)])
def test_steps_that_are_smaller_than_a_weights_precision_count_in_the_mean(
    tmp_path: Path, optim: str | None, moves: bool
) -> None:
    model = model_of()
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    # Above 1, numbers in bf16 lie 2^-7 apart.
    with torch.no_grad():
        weight.fill_(1.2)
    before = weight.detach().bfloat16().float().clone()
    settings = config(optim=optim, weights_dtype="bfloat16", learning_rate=1e-4, stage1_steps=4, stage2_steps=4)
    train_two_stage(model, toy_rows(64), settings, tmp_path)
    moved = (weight.float() != before).float().mean().item()
    # Eight steps of at most 1e-4, of a distance of 2^-7.
    assert (0 < moved < 0.2) if moves else moved == 0


@needs_torchao
def test_weights_in_bf16_leave_routers_and_buffers_as_they_are(tmp_path: Path) -> None:
    model = model_of()
    train_two_stage(model, toy_rows(64), config(weights_dtype="bfloat16", stage1_steps=2, stage2_steps=2), tmp_path)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if ".router." in name else torch.bfloat16), name
    assert all(buffer.dtype == torch.float32 for _, buffer in model.named_buffers())
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model")
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("step", [2, 4])
@pytest.mark.parametrize("name", [needing("adamw_torch_8bit"), needing("adamw_bnb_8bit")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_goes_on_with_the_narrow_moments(
    tmp_path: Path, name: str, dtype: torch.dtype, step: int
) -> None:
    # Rounding goes on with the same random numbers, too.
    rounds = "bf16_stochastic_round=True" if OPTIMISERS[name].rounds else None
    whole, other = (trainer_of(tmp_path / "a", optim=name, optim_args=rounds) for _ in range(2))
    for trainer, checkpoint in ((whole, None), (other, str(tmp_path / "a" / f"checkpoint-{step}"))):
        cast_weights_(trainer.model, dtype)
        trainer.train(resume_from_checkpoint=checkpoint)
    for one, two in zip(whole.model.parameters(), other.model.parameters(), strict=True):
        assert one.equal(two)


@needs_torchao
@pytest.mark.parametrize(
    ("options", "cuda", "expected"),
    [
        ({}, False, ("adamw_torch", None)),
        ({}, True, ("adamw_torch_fused", None)),
        ({"optim": "adamw_torch_8bit"}, True, ("adamw_torch_8bit", None)),
        ({"weights_dtype": "bfloat16"}, True, ("adamw_torch_8bit", "bf16_stochastic_round=True")),
        (
            {"weights_dtype": "bfloat16", "optim": "adamw_torch_4bit"},
            True,
            ("adamw_torch_4bit", "bf16_stochastic_round=True"),
        ),
        ({"weights_dtype": "bfloat16", "optim": "adamw_torch"}, True, ("adamw_torch", None)),
    ],
)
def test_the_optimiser_of_the_settings(options: dict[str, Any], cuda: bool, expected: tuple[str, str | None]) -> None:
    assert tuple(optimiser_arguments(config(**options), cuda).values()) == expected


def test_the_memory_of_squared_gradients_reaches_the_optimiser(tmp_path: Path) -> None:
    assert training_arguments(config(adam_beta2=0.95), tmp_path, 10).adam_beta2 == 0.95
    assert training_arguments(config(), tmp_path, 10).adam_beta2 == 0.999


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: config(optim="sgd"), "optim must be one of adamw_torch, .*got optim='?sgd"),
        (lambda: config(weights_dtype="float16"), "weights_dtype must be one of float32, bfloat16, got"),
        (lambda: config(adam_beta2=1.0), r"adam_beta2 must lie in \[0, 1\), got adam_beta2=1.0"),
        (
            lambda: config(weights_dtype="bfloat16", lora_rank=4, lora_4bit=True),
            "weights_dtype must be float32 with lora_4bit, whose weights are in 4 bits, got weights_dtype=bfloat16",
        ),
    ],
)
def test_bad_settings_are_clear_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_an_optimiser_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimisers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="got optim=adamw_bnb_8bit, without bitsandbytes; pip install bitsandbytes"):
        optimiser_arguments(config(optim="adamw_bnb_8bit"), False)
    with pytest.raises(ValueError, match="optim=adamw_torch_8bit, which weights_dtype=bfloat16 takes where none is"):
        optimiser_arguments(config(weights_dtype="bfloat16"), False)


def test_only_weights_are_cast() -> None:
    model = nn.ModuleDict({"router": nn.Linear(2, 2), "norm": nn.BatchNorm1d(2)})
    cast_weights_(model, torch.bfloat16)
    dtypes = {name: value.dtype for name, value in model.state_dict().items()}
    assert dtypes["router.weight"] == torch.float32
    assert dtypes["norm.weight"] == torch.bfloat16
    assert dtypes["norm.running_mean"] == torch.float32


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_bnb_8bit"])
def test_a_rounding_that_loses_steps_is_a_warning(name: str) -> None:
    message = f"optim={name} rounds weights in bfloat16 to the nearest number, .*; take --optim adamw_torch_8bit"
    with pytest.warns(UserWarning, match=message):
        warn_of_lost_steps(config(weights_dtype="bfloat16", optim=name))


@pytest.mark.parametrize(
    "options",
    [
        {"optim": "adamw_bnb_8bit"},
        {"weights_dtype": "bfloat16"},
        {"weights_dtype": "bfloat16", "optim": "adamw_torch_4bit"},
        {"weights_dtype": "bfloat16", "optim": "adamw_torch", "lora_rank": 4},
        {"weights_dtype": "bfloat16", "optim": "adamw_torch", "trainable": "routers"},
    ],
)
def test_no_warning_where_no_step_is_lost(options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_lost_steps(config(**options))


def test_a_training_that_loses_steps_says_so(tmp_path: Path) -> None:
    options = config(weights_dtype="bfloat16", optim="adamw_torch", stage1_steps=1, stage2_steps=1)
    with pytest.warns(UserWarning, match="optim=adamw_torch rounds weights in bfloat16"):
        train_two_stage(model_of(), toy_rows(16), options, tmp_path)


def test_what_is_named_against_a_full_gpu_goes_together() -> None:
    names = [name for name in OPTIMISERS if f"--optim {name}" in MEMORY_HINT.replace(",", " ")]
    assert "--weights-dtype bfloat16" in MEMORY_HINT
    assert any(OPTIMISERS[name].rounds for name in names)
    assert "adamw_bnb_8bit" not in MEMORY_HINT


class Products(TorchDispatchMode):
    """Writes down of which dtypes gradients and what they are multiplied by are."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[torch.dtype, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._foreach_mul_.Tensor:
            self.found += [(each.dtype, args[1].dtype) for each in args[0]]
        return func(*args, **(kwargs or {}))


def test_gradients_in_two_dtypes_are_clipped_by_one_norm_each_in_its_own(tmp_path: Path) -> None:
    """PyTorch multiplies a gradient in bf16 by a norm in fp32 in a kernel for each tensor."""
    trainer = trainer_of(tmp_path, max_grad_norm=0.5)
    model = trainer.model
    cast_weights_(model, torch.bfloat16)
    parameters = [each for each in model.parameters() if each.requires_grad]
    generator = torch.Generator().manual_seed(0)
    for each in parameters:
        each.grad = torch.randn(each.shape, generator=generator).to(each.dtype)
    before = [each.grad.float().clone() for each in parameters if each.grad is not None]
    norm = torch.stack([each.square().sum() for each in before]).sum().sqrt()
    with Products() as products:
        found = trainer._clip_grad_norm(model)
    assert found.item() == pytest.approx(norm.item(), rel=5e-3)
    assert {*products.found} == {(dtype, dtype) for dtype in (torch.bfloat16, torch.float32)}
    assert len(products.found) == len(parameters)
    for each, old in zip(parameters, before, strict=True):
        assert each.grad is not None
        torch.testing.assert_close(each.grad.float(), old * 0.5 / norm, rtol=2e-2, atol=1e-6)
    # Small ones stay what they are.
    for each in parameters:
        assert each.grad is not None
        each.grad.mul_(0.5)
    before = [each.grad.clone() for each in parameters if each.grad is not None]
    trainer._clip_grad_norm(model)
    assert all(torch.equal(one.grad, other) for one, other in zip(parameters, before, strict=True))
