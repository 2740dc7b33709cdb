"""A change of a model that fails on the way, at any line and in any operation, leaves the model as it was."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lte
from lte.methods.moefication import MoeficationConfig
from lte.methods.static_pruning import StaticPruningConfig
from lte.methods.teal import TealConfig
from lte.methods.wanda import WandaConfig
from lte.nn import all_or_nothing
from tests.hf.accelerated_models import TOLERANCE
from tests.tiny_models import EXPERT_SIZE, logits_of, tiny_dense_model, tiny_sparse_model

Make = Callable[[], Any]
Verb = Callable[[Any], object]


class FailingOperation(TorchDispatchMode):
    """The n-th operation of PyTorch finds no memory."""

    def __init__(self, number: int):
        super().__init__()
        self.left = number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            raise torch.OutOfMemoryError("out of memory")
        return func(*args, **(kwargs or {}))


@contextmanager
def interrupted(number: int) -> Iterator[list[int]]:
    """Ctrl-C at the n-th line of the library that runs, but for those that undo; yields how many lines were left."""
    left, own = [number], all_or_nothing.__file__

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        name = frame.f_code.co_filename
        if "/lte/" not in name or name == own:
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield left
    finally:
        sys.settrace(before)


def batches() -> list[dict[str, Tensor]]:
    return [{"input_ids": torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(3))}]


def state(model: Any) -> dict[str, Any]:
    """What a model is: classes, attributes and hooks of its modules, its config, and all its numbers."""
    found: dict[str, Any] = {"config": (type(model.config), model.config.to_dict())}
    for name, module in model.named_modules(remove_duplicate=False):
        hooks = (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._load_state_dict_post_hooks))
        found[name] = (type(module), module.training, sorted(vars(module)), hooks, getattr(module, "mode", None))
    for name, tensor in model.named_parameters():
        found[f"{name} (tensor)"] = (tensor.detach().clone(), tensor.requires_grad, tensor.dtype)
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2] not in ("stacked", "router_rows"):
            found[f"{name} (tensor)"] = (buffer.clone(), False, buffer.dtype)
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    def same(a: Any, b: Any) -> bool:
        return torch.equal(a[0], b[0]) and a[1:] == b[1:] if isinstance(a[0], Tensor) else a == b

    return sorted(
        name for name in {*one, *other} if not (name in one and name in other and same(one[name], other[name]))
    )


def experts() -> lte.LteConfig:
    return lte.LteConfig(expert_size=EXPERT_SIZE, grouping="random")


def sparsify(config: Any) -> Verb:
    return lambda model: lte.sparsify_(model, config, calibration=batches())


VERBS: dict[str, tuple[Make, Verb]] = {
    "accelerate": (lambda: tiny_sparse_model("bert"), lte.accelerate_),
    "accelerate to int8": (tiny_sparse_model, lambda model: lte.accelerate_(model, "int8")),
    "decelerate": (lambda: lte.accelerate_(tiny_sparse_model("opt")), lte.decelerate_),
    "decelerate from int8": (lambda: lte.accelerate_(tiny_sparse_model(), "int8"), lte.decelerate_),
    "densify": (lambda: tiny_sparse_model("bert"), lte.densify_),
    "densify from int8": (lambda: lte.accelerate_(tiny_sparse_model(), "int8"), lte.densify_),
    "densify teal": (lambda: sparsify(TealConfig())(tiny_dense_model()), lte.densify_),
    "sparsify": (tiny_dense_model, sparsify(experts())),
    "sparsify a spread FFN": (lambda: tiny_dense_model("opt"), sparsify(experts())),
    "teal": (tiny_dense_model, sparsify(TealConfig())),
    "moefication": (tiny_dense_model, sparsify(MoeficationConfig(expert_size=EXPERT_SIZE, grouping="random"))),
    "static pruning": (tiny_dense_model, sparsify(StaticPruningConfig(expert_size=EXPERT_SIZE))),
    "wanda": (tiny_dense_model, sparsify(WandaConfig())),
    "calibrate": (tiny_sparse_model, lambda model: lte.calibrate_(model, batches(), target_sparsity=0.3)),
}


@pytest.mark.parametrize("verb", VERBS)
def test_any_failure_leaves_the_model_as_it_was(verb: str, tokens: Tensor) -> None:
    make, act = VERBS[verb]
    act(make())
    with FailingOperation(0) as counter:
        whole = act(make_outside(make, counter))
    operations, after = -counter.left, state(whole)
    with interrupted(0) as left:
        act(make_outside(make, None))
    lines, outcomes = -left[0], set()
    # About 7 places each, spread over the whole way.
    for number in range(1, operations, max(1, operations // 7)):
        model = make()
        before, output = state(model), logits_of(model, tokens)
        with pytest.raises(RuntimeError, match="out of memory"), FailingOperation(number):
            act(model)
        check(model, before, output, tokens)
    for number in range(1, lines, max(1, lines // 7)):
        model = make()
        before, output = state(model), logits_of(model, tokens)
        with pytest.raises(KeyboardInterrupt), interrupted(number):
            act(model)
        changed = bool(differences(state(model), before))
        outcomes.add(changed)
        if changed:
            assert not differences(state(model), after)
        else:
            check(model, before, output, tokens)
    assert False in outcomes


def make_outside(make: Make, counter: FailingOperation | None) -> Any:
    """A model whose making is not counted."""
    tracer = sys.gettrace()
    sys.settrace(None)
    left = 0 if counter is None else counter.left
    model = make()
    if counter is not None:
        counter.left = left
    sys.settrace(tracer)
    return model


def check(model: Any, before: dict[str, Any], output: Tensor, tokens: Tensor) -> None:
    assert differences(state(model), before) == []
    found = logits_of(model, tokens)
    assert torch.allclose(found, output, atol=TOLERANCE), float((found - output).abs().max())


def test_an_accelerated_model_stays_one_that_is_not_all_in_memory_twice() -> None:
    model = lte.accelerate_(tiny_sparse_model())
    held = [ffn.stacked.untyped_storage() for ffn in lte.sparse_ffns(model).values()]
    pointers = {storage.data_ptr() for storage in held}
    assert len(pointers) == 2
    lte.decelerate_(model)
    assert not any(p.untyped_storage().data_ptr() in pointers for p in model.parameters())


def test_a_block_within_a_block_is_undone_with_it() -> None:
    module = nn.Linear(2, 2)
    start = module.weight.detach().clone()

    def change() -> None:
        with all_or_nothing.all_or_nothing(module):
            with all_or_nothing.all_or_nothing(module):
                all_or_nothing.keep_numbers([module.weight])
                with torch.no_grad():
                    module.weight.zero_()
                module.register_buffer("scale", torch.ones(1))
            assert not module.weight.any()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        change()
    assert torch.equal(module.weight, start)
    assert not list(module.buffers())
