"""Calls of one model leave nothing for each other: in threads, nested, failing, in copies, under `torch.func`."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lte
from lte.eval.sparsity import SparsityCounter, measure_sparsity
from lte.nn.hooks import before_each_call
from tests.tiny_models import logits_of, tiny_sparse_model, zero_dropout_

THREADS = 3


@pytest.fixture
def eager_switching() -> Iterator[None]:
    """Threads that take turns within a forward pass."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def texts(count: int = THREADS) -> list[Tensor]:
    return [torch.randint(3, 99, (1, 9), generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


@pytest.mark.usefixtures("eager_switching")
@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("model_type", ["bert", "opt", "llama"])
def test_threads_share_a_model(model_type: str, accelerated: bool) -> None:
    model = tiny_sparse_model(model_type)
    if accelerated:
        lte.accelerate_(model)
    inputs = texts()
    expected = [logits_of(model, ids) for ids in inputs]

    def work(index: int) -> bool:
        return all(torch.allclose(logits_of(model, inputs[index]), expected[index], atol=1e-5) for _ in range(40))

    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(work, range(THREADS))) == [True] * THREADS


@pytest.mark.usefixtures("eager_switching")
@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_what_is_measured_is_of_the_own_thread(model_type: str) -> None:
    model, (counted, other) = tiny_sparse_model(model_type), texts(2)
    alone = measure_sparsity(model, [{"input_ids": counted}])
    stop = threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            logits_of(model, other)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        with SparsityCounter(model) as counter:
            for _ in range(20):
                logits_of(model, counted)
                counter.update(torch.ones_like(counted, dtype=torch.bool))
    finally:
        stop.set()
        thread.join()
    assert counter.result().expert_use == alone.expert_use
    assert all(ffn.logits is None for ffn in lte.sparse_ffns(model).values())


def test_hooks_that_collect_see_the_calls_of_their_thread() -> None:
    module, seen = nn.Linear(2, 2), []
    with before_each_call({"m": module}, lambda key, args: seen.append(args[0])):
        other = threading.Thread(target=module, args=(torch.zeros(1, 2),))
        other.start()
        other.join()
        module(torch.ones(1, 2))
    assert [float(x.sum()) for x in seen] == [2.0]


@pytest.mark.parametrize("model_type", ["bert", "opt"])
def test_a_call_within_a_call(model_type: str) -> None:
    model, (ids, other) = tiny_sparse_model(model_type), texts(2)
    expected, inner = logits_of(model, ids), logits_of(model, other)
    ffn = next(iter(lte.sparse_ffns(model).values()))
    found: list[Tensor] = []

    def call_again(module: nn.Module, args: Any, output: Tensor) -> None:
        if not found:
            found.append(torch.empty(0))
            found[0] = logits_of(model, other)

    ffn.part(ffn.layout.up).register_forward_hook(call_again)
    assert torch.equal(logits_of(model, ids), expected)
    assert torch.equal(found[0], inner)


@pytest.mark.parametrize("model_type", ["bert", "opt"])
def test_a_call_that_fails_on_the_way_leaves_nothing(model_type: str) -> None:
    model, (ids, other) = tiny_sparse_model(model_type), texts(2)
    expected = logits_of(model, ids)
    ffn = next(iter(lte.sparse_ffns(model).values()))

    def fail(module: nn.Module, args: Any, output: Tensor) -> None:
        raise RuntimeError("out of memory")

    hook = ffn.part(ffn.layout.up).register_forward_hook(fail)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="out of memory"):
            logits_of(model, other)
    assert ffn._of_thread.inputs == []
    hook.remove()
    assert torch.equal(logits_of(model, ids), expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("model_type", ["bert", "opt"])
def test_checkpointed_passes_have_the_same_gradients(model_type: str, reentrant: bool) -> None:
    model, ids = zero_dropout_(tiny_sparse_model(model_type)).train(), texts(1)[0]
    for ffn in lte.sparse_ffns(model).values():
        ffn.set_mode("soft")
    gradients = []
    for checkpoints in (False, True):
        model.zero_grad()
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(ids).logits.square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[1][name], gradient, atol=1e-7) for name, gradient in gradients[0].items())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_start_without_what_calls_have_left(duplicate: Any) -> None:
    model, ids = tiny_sparse_model("bert"), texts(1)[0]
    for ffn in lte.sparse_ffns(model).values():
        ffn.record_logits = True
    model(ids)
    twin = duplicate(model)
    assert all(ffn.logits is None for ffn in lte.sparse_ffns(twin).values())
    assert all(ffn.logits is not None for ffn in lte.sparse_ffns(model).values())
    logits_of(twin, ids)
    assert all(ffn.logits is not None for ffn in lte.sparse_ffns(twin).values())


def test_a_copy_made_during_a_call() -> None:
    model, ids = tiny_sparse_model("opt"), texts(1)[0]
    expected, twins = logits_of(model, ids), []
    ffn = next(iter(lte.sparse_ffns(model).values()))
    up = ffn.part(ffn.layout.up)
    up.register_forward_hook(lambda *args: None if twins else twins.append(copy.deepcopy(model)))
    assert torch.equal(logits_of(model, ids), expected)
    assert torch.equal(logits_of(twins[0], ids), expected)


def test_a_replica_for_data_parallel_is_plain(tokens: Tensor) -> None:
    """Replicas share all but their modules' dictionaries; parameters are plain tensors there."""
    model = lte.accelerate_(tiny_sparse_model("opt"))
    block = next(iter(lte.sparse_ffns(model).values())).block[0]
    x = torch.randn(1, 4, 32)
    with torch.no_grad():
        expected = block(x)[0]
        replicas = {module: module._replicate_for_data_parallel() for module in block.modules()}
        for module, replica in replicas.items():
            for name, child in module._modules.items():
                replica._modules[name] = None if child is None else replicas[child]
            for name, parameter in module._parameters.items():
                setattr(replica, name, None if parameter is None else parameter.detach().clone())
        assert torch.allclose(replicas[block](x)[0], expected, atol=1e-5)


@pytest.mark.parametrize("mode", ["soft", "hard"])
@pytest.mark.parametrize("model_type", ["llama", "opt", "t5"])
def test_gradients_of_each_row(model_type: str, mode: Any) -> None:
    model, ids = zero_dropout_(tiny_sparse_model(model_type)), torch.cat(texts())
    for ffn in lte.sparse_ffns(model).values():
        ffn.set_mode(mode)

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        inputs = {"decoder_input_ids": row[None]} if model.config.is_encoder_decoder else {}
        return torch.func.functional_call(model, parameters, (row[None],), inputs).logits.square().mean()

    for network in (model, lte.accelerate_(copy.deepcopy(model))):
        parameters = {name: p.detach() for name, p in network.named_parameters()}
        per_row = torch.func.vmap(torch.func.grad(loss), (None, 0), randomness="different")(parameters, ids)
        for index, row in enumerate(ids):
            model.zero_grad()
            loss(dict(model.named_parameters()), row).backward()
            for name, p in model.named_parameters():
                wanted = torch.zeros_like(p) if p.grad is None else p.grad
                assert torch.allclose(per_row[name][index], wanted, atol=1e-5), name


def test_accelerated_rows_under_vmap_without_gradients() -> None:
    model, x = tiny_sparse_model(), torch.randn(3, 4, 32)
    ffn = next(iter(lte.sparse_ffns(model).values()))
    with torch.no_grad():
        expected = ffn(x)
        lte.accelerate_(model)
        assert torch.allclose(torch.func.vmap(ffn)(x), expected, atol=1e-5)


def test_compiled_calls_leave_their_logits_in_their_thread() -> None:
    torch.compiler.reset()
    model, (ids, other) = tiny_sparse_model("opt"), texts(2)
    ffns = list(lte.sparse_ffns(model).values())
    for ffn in ffns:
        ffn.record_logits = True
    expected = []
    for x in (ids, other):
        logits_of(model, x)
        expected.append(ffns[0].logits)
    step = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    logits_of_step = []

    def call(x: Tensor) -> None:
        with torch.no_grad():
            step(x)
        logits_of_step.append(ffns[0].logits)

    call(ids)
    thread = threading.Thread(target=call, args=(other,))
    thread.start()
    thread.join()
    logits_of_step.append(ffns[0].logits)
    for found, wanted in zip(logits_of_step, (expected[0], expected[1], expected[0]), strict=True):
        assert torch.allclose(found, wanted, atol=1e-5)
