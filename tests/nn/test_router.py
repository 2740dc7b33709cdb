"""The router: start values, fp32 in models of any dtype, gradients, and what its backward pass keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lte.nn.router import INITIAL_LOGIT, Router

TOKENS = (1, 2, 7, 33)


def random_router(hidden_size: int, num_experts: int, rank: int | None = None, **factory: object) -> Router:
    router = Router(hidden_size, num_experts, rank, **factory)
    for parameter in router.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return router


def reference_logits(router: Router, x: Tensor) -> Tensor:
    x, weight, bias = x.double(), router.weight.double(), router.bias.double()
    if router.down is not None:
        x = x @ router.down.double().T
    return x @ weight.T + bias


@pytest.mark.parametrize("rank", [None, 4])
def test_start_values(rank: int | None) -> None:
    scores = Router(64, 8, rank)(torch.randn(5, 64) * 100).sigmoid()
    assert torch.equal(scores, torch.full((5, 8), INITIAL_LOGIT).sigmoid())
    assert 0.95 < scores[0, 0] < 0.96
    # Half a score away from tau, 1 / (G - tau)^2 is within a factor of 5 of its floor of 4: no pole near by.
    assert 1 / (scores[0, 0] - 0.5) ** 2 < 5


def test_low_rank_start_breaks_the_symmetry_of_both_factors() -> None:
    router = Router(64, 8, 4)
    router(torch.randn(5, 64)).sum().backward()
    assert router.weight.grad is not None
    assert (router.weight.grad != 0).any(), "U can leave 0 only if V is not 0"


def test_low_rank_start_is_reproducible() -> None:
    router = Router(64, 8, 4)
    router.reset_parameters(torch.Generator().manual_seed(3))
    first = router.down.clone()  # type: ignore[union-attr]
    router.reset_parameters(torch.Generator().manual_seed(3))
    assert torch.equal(router.down, first)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weights", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("hidden_size", [64, 100, 768])
def test_logits_are_fp32_at_fp32_accuracy(dtype, weights, rank, hidden_size, relative_rms) -> None:
    router = random_router(hidden_size, 6, rank, dtype=weights)
    for count in TOKENS:
        x = torch.randn(count, hidden_size).to(dtype)
        logits = router(x)
        assert logits.dtype == torch.float32
        assert relative_rms(logits, reference_logits(router, x)) <= 1e-5


@pytest.mark.parametrize("rank", [None, 4])
def test_autocast_changes_nothing(rank: int | None) -> None:
    router = random_router(64, 6, rank)
    x = torch.randn(7, 64, requires_grad=True)
    plain = router(x)
    (plain_grad,) = torch.autograd.grad(plain.square().sum(), x)
    with torch.autocast("cpu", torch.bfloat16):
        logits = router(x)
        (grad,) = torch.autograd.grad(logits.square().sum(), x)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, plain)
    assert torch.equal(grad, plain_grad)


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8)])
def test_gradcheck(rank: int | None, shape: tuple[int, ...]) -> None:
    router = random_router(8, 4, rank, dtype=torch.float64)
    names = [name for name, _ in router.named_parameters()]
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(router, dict(zip(names, parameters, strict=True)), x)

    assert torch.autograd.gradcheck(run, (x, *router.parameters()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_input_gets_the_fp32_gradient(dtype: torch.dtype, relative_rms) -> None:
    router = random_router(64, 6)
    x = torch.randn(33, 64).to(dtype).requires_grad_()
    upstream = torch.randn(33, 6)
    router(x).backward(upstream)
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert relative_rms(x.grad, upstream @ router.weight) <= 1e-2
    assert relative_rms(router.weight.grad, upstream.T @ x.float()) <= 1e-5
    assert relative_rms(router.bias.grad, upstream.sum(0)) <= 1e-5


def test_backward_keeps_no_fp32_copy_of_the_input() -> None:
    router = random_router(64, 6)
    x = torch.randn(33, 64).bfloat16().requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        router(x)
    inputs = [tensor for tensor in kept if tensor.shape == x.shape]
    assert [tensor.dtype for tensor in inputs] == [torch.bfloat16]
    assert inputs[0].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
