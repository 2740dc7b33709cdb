"""The loss over chunks of tokens against the one over all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lte.config import IGNORED
from lte.hf.language_head import LanguageHead
from lte.train import chunked_loss
from lte.train.chunked_loss import chunk_terms, chunk_tokens, chunked_language_terms
from lte.train.objective import language_terms

ROWS, LENGTH, WIDTH, VOCABULARY = 3, 11, 16, 50


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, LanguageHead, tuple[Tensor, LanguageHead]]:
    """Hidden states, labels and head of a student, and hidden states and head of a teacher of another width."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden = random(ROWS, LENGTH, WIDTH).requires_grad_()
    head = LanguageHead(random(VOCABULARY, WIDTH).requires_grad_(), random(VOCABULARY).requires_grad_())
    labels = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    labels[0, :4], labels[2] = IGNORED, IGNORED
    return hidden, labels, head, (random(ROWS, LENGTH, 24), LanguageHead(random(VOCABULARY, 24)))


def shaped(head: LanguageHead, scale: float, cap: float | None) -> LanguageHead:
    return LanguageHead(head.weight, head.bias, scale, cap)


@pytest.mark.parametrize("tokens", [1, 8, 33, 64])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.25, None), (1.0, 3.0), (2.0, 5.0)])
def test_loss_and_gradients_are_those_of_all_logits(
    tokens: int, weight: float, scale: float, cap: float | None
) -> None:
    hidden, labels, head, (teacher_hidden, teacher_head) = inputs()
    head, teacher_head = shaped(head, scale, cap), shaped(teacher_head, 1.0, 4.0)
    num_items = torch.tensor(29)
    teacher_logits = teacher_head.logits(teacher_hidden) if weight else None
    task, divergence = language_terms(head.logits(hidden), labels, teacher_logits, num_items)
    expected = (1 - weight) * task + weight * divergence
    wanted = [hidden, head.weight, head.bias]
    # Times 3, as of a loss that is scaled further.
    gradients = torch.autograd.grad(3 * expected, wanted)
    teacher = (teacher_hidden, teacher_head) if weight else None
    found = chunked_language_terms(hidden, labels, head, teacher, weight, num_items, tokens=tokens)
    torch.testing.assert_close(found, (expected, task, divergence), rtol=1e-5, atol=1e-7)
    assert [value.requires_grad for value in found] == [True, False, False]
    for one, other in zip(torch.autograd.grad(3 * found[0], wanted), gradients, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_the_gradient_is_that_of_finite_differences() -> None:
    hidden, labels, head, teacher = inputs(torch.float64)
    assert head.bias is not None

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return chunked_language_terms(hidden, labels, LanguageHead(weight, bias, 0.5, 4.0), teacher, 0.4, tokens=8)[0]

    assert torch.autograd.gradcheck(loss, (hidden, head.weight, head.bias))


def test_without_a_label_the_loss_and_its_gradient_are_0() -> None:
    hidden, labels, head, teacher = inputs()
    found = chunked_language_terms(hidden, torch.full_like(labels, IGNORED), head, teacher, 0.5, tokens=8)
    assert [value.item() for value in found] == [0, 0, 0]
    assert not any(each.any() for each in torch.autograd.grad(found[0], [hidden, head.weight]))


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_in_bf16_it_is_as_near_to_fp32_as_all_logits_are(weights: torch.dtype) -> None:
    hidden, labels, head, (teacher_hidden, teacher_head) = inputs()
    teacher = (teacher_hidden.bfloat16(), LanguageHead(teacher_head.weight.bfloat16()))
    teacher_logits = teacher[1].logits(teacher[0])
    assert head.bias is not None
    exact = [hidden, head.weight, head.bias]
    _, reference = language_terms(head.logits(hidden), labels, teacher_logits)
    gradients = torch.autograd.grad(reference, exact)
    narrow = [each.detach().to(weights).requires_grad_() for each in exact]
    narrow_head = LanguageHead(narrow[1], narrow[2])
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        _, whole = language_terms(narrow_head.logits(narrow[0]), labels, teacher_logits)
        loss, _, _ = chunked_language_terms(narrow[0], labels, narrow_head, teacher, 1.0, tokens=8)
    assert abs(loss - reference) <= 2 * abs(whole - reference) + 1e-3 * reference
    of_chunks = torch.autograd.grad(loss, narrow)
    of_all = torch.autograd.grad(whole, narrow)
    for chunked, all_at_once, wanted in zip(of_chunks, of_all, gradients, strict=True):
        assert chunked.dtype == weights
        errors = [((each.float() - wanted).norm() / wanted.norm()).item() for each in (chunked, all_at_once)]
        assert errors[0] <= 1.2 * errors[1] + 1e-3


def test_no_tensor_has_the_logits_of_more_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, labels, head, teacher = inputs()
    seen: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = function(*args, **(kwargs or {}))
            tensors = found if isinstance(found, tuple | list) else [found]
            seen.extend(
                each.numel() for each in tensors if isinstance(each, Tensor) and each.shape[-1:] == (VOCABULARY,)
            )
            return found

    with Watch():
        loss, _, _ = chunked_language_terms(hidden, labels, head, teacher, 0.5, tokens=8)
        loss.backward()
    # The head's transposed weight has the vocabulary as its last width, too.
    assert max(seen) == max(8, WIDTH, 24) * VOCABULARY
    assert seen.count(8 * VOCABULARY) > 4


@pytest.mark.parametrize("frozen", ["head", "hidden", "all"])
def test_what_is_frozen_gets_no_gradient(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, labels, head, teacher = inputs()
    asked: list[bool] = []

    def terms(*args: Any) -> Any:
        asked.append(args[-1])
        return chunk_terms(*args)

    for name, tensors in {"head": [head.weight, head.bias], "hidden": [hidden]}.items():
        if frozen in (name, "all"):
            for tensor in tensors:
                assert tensor is not None
                tensor.requires_grad_(False)
    loss, _, _ = chunked_language_terms(hidden, labels, head, teacher, 0.5, tokens=16, terms=terms)
    assert asked == [frozen != "all"] * 3
    if frozen != "all":
        loss.backward()
        assert (hidden.grad is None) == (frozen == "hidden")
        assert (head.weight.grad is None) == (frozen == "head")


def test_chunks_are_powers_of_two_that_fit() -> None:
    assert chunk_tokens(151936) == 1024
    assert chunk_tokens(50257) == 4096
    assert chunk_tokens(chunked_loss.CHUNK_LOGITS * 3) == 1
