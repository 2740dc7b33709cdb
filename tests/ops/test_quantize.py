"""8-bit rows: the bound of the error, the extremes, and what is refused."""

from __future__ import annotations

import pytest
import torch

from lte.ops.quantize import dequantize_rows, quantize_rows
from lte.ops.step.plan import Quantized


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (64, 100)])
def test_the_error_is_at_most_half_a_step(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = (torch.randn(shape) * torch.logspace(-3, 1, shape[0]).unsqueeze(1)).to(dtype)
    values, scale = quantize_rows(weight)
    assert (values.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert (values.shape, scale.shape) == (weight.shape, (shape[0],))
    error = (dequantize_rows(values, scale).double() - weight.double()).abs()
    assert (error <= 0.5001 * scale.double().unsqueeze(1)).all()


def test_every_row_uses_the_whole_range() -> None:
    weight = torch.randn(9, 40) * torch.logspace(-6, 6, 9).unsqueeze(1)
    values, scale = quantize_rows(weight)
    assert (values.abs().amax(1) == 127).all()
    torch.testing.assert_close(scale * 127, weight.abs().amax(1))


def test_both_signs_are_alike() -> None:
    weight = torch.randn(5, 30)
    assert torch.equal(quantize_rows(-weight)[0], -quantize_rows(weight)[0])


def test_multiples_of_the_scale_come_back_exactly() -> None:
    values = torch.randint(-127, 128, (6, 50), dtype=torch.int8)
    values[:, 0] = 127
    scale = torch.tensor([2.0**-k for k in range(6)])
    found, found_scale = quantize_rows(dequantize_rows(values, scale))
    assert torch.equal(found, values)
    assert torch.equal(found_scale, scale)


@pytest.mark.parametrize("value", [0.0, 1e-42])
def test_rows_of_nothing_stay_finite(value: float) -> None:
    weight = torch.full((2, 8), value)
    weight[1] = 3.0
    back = dequantize_rows(*quantize_rows(weight))
    assert (back[0].abs() <= value).all()
    torch.testing.assert_close(back[1], weight[1])


def test_the_dtype_that_is_asked_for() -> None:
    weight = torch.randn(4, 8, dtype=torch.bfloat16)
    values, scale = quantize_rows(weight)
    back = dequantize_rows(values, scale, torch.bfloat16)
    assert back.dtype == torch.bfloat16
    assert torch.equal(back, dequantize_rows(values, scale).bfloat16())


def test_what_is_no_weight_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight must be a floating-point matrix, got torch.int8 of shape \(2, 2\)"):
        quantize_rows(torch.zeros(2, 2, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"weight must be a floating-point matrix, got torch.float32 of shape \(2,\)"):
        quantize_rows(torch.zeros(2))
    for value in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="weight must be finite"):
            quantize_rows(torch.tensor([[1.0, value]]))


@pytest.mark.parametrize("with_zeros", [False, True])
def test_rows_of_a_quantized_matrix_are_split(with_zeros: bool) -> None:
    values = torch.randint(-8, 8, (7, 12), dtype=torch.int8)
    scales, zeros = torch.rand(2, 7, 3)
    whole = Quantized(values=values, scales=scales, zeros=zeros if with_zeros else None, bits=4)
    parts = whole.split([2, 4, 1])
    assert [len(part) for part in parts] == [2, 4, 1]
    assert {(part.bits, part.group) for part in parts} == {(4, 4)}
    assert torch.equal(torch.cat([part.dense(torch.float32) for part in parts]), whole.dense(torch.float32))
