"""Training with compiled layers: how often they are compiled, and that it changes nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import lte
from lte.data.rows import TokenRows
from lte.nn.sparse_ffn import SparseFfn
from lte.train.compilation import checkpoint_compiled_
from lte.train.config import TrainConfig
from lte.train.processes import training_device
from lte.train.summary import TrainingSummary
from lte.train.trainer import LteTrainer
from lte.train.two_stage import train_two_stage
from tests.tiny_models import tiny_dense_model
from tests.train.toy import toy_rows

LONGEST = 64


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> CompileCounter:
    """Counts the graphs that are compiled, and runs them as they are."""
    counter = CompileCounter()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compile_(*args, **{**kwargs, "backend": counter}))
    torch.compiler.reset()
    return counter


def rows_of(lengths: list[int]) -> TokenRows:
    rows = toy_rows(len(lengths), LONGEST)
    cut = [row["input_ids"][:length] for row, length in zip(rows, lengths, strict=True)]
    return TokenRows(cut, cut)


def train(rows: TokenRows, folder: Path, **options: Any) -> tuple[torch.nn.Module, TrainingSummary]:
    model = tiny_dense_model().to(training_device())
    lte.sparsify_(model, lte.LteConfig(expert_size=8, grouping="contiguous"))
    settings = {"batch_size": 4, "learning_rate": 1e-3, "router_fit_tokens": 256, "calibration_tokens": 512}
    return model, train_two_stage(model, rows, TrainConfig(**{**settings, **options}), folder)


def test_rows_of_all_lengths_are_compiled_once(tmp_path: Path, compilations: CompileCounter) -> None:
    # Without the batches that are no training steps: how many rows they have depends on their lengths.
    options = {"compile": True, "router_fit_tokens": 0, "calibration_tokens": 0}
    # Rows of one length would have no mask.
    train(rows_of([LONGEST - i for i in range(16)]), tmp_path / "a", **options)
    once = compilations.frame_count
    assert once > 0
    torch.compiler.reset()
    compilations.clear()
    train(rows_of([60, 20, 35, 12, 50, 41, 33, 18, 9, 11, 63, 47, 44, 28, 15, 30]), tmp_path / "b", **options)
    assert compilations.frame_count == once


def test_compiled_training_is_the_eager_one(tmp_path: Path, compilations: CompileCounter) -> None:
    rows = rows_of([60, 20, 35, 12, 50, 41, 33, 18])
    eager, _ = train(rows, tmp_path / "eager")
    compiled, _ = train(rows, tmp_path / "compiled", compile=True)
    assert compilations.frame_count > 0
    for one, other in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    # What comes after runs as it was.
    frames = compilations.frame_count
    torch.compiler.reset()
    ids = rows[0]["input_ids"][None].to(training_device())
    torch.testing.assert_close(eager(ids).logits, compiled(ids).logits, rtol=1e-3, atol=1e-4)
    assert compilations.frame_count == frames


def test_layers_that_are_computed_again_are_the_graphs_of_the_forward_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A layer that records is another graph than one that does not, if tensors of other shapes are saved or not.
    seen: list[tuple[bool, bool]] = []
    left: list[Any] = []
    route, step = SparseFfn._route, LteTrainer.training_step

    def routed(self: SparseFfn, x: torch.Tensor) -> torch.Tensor:
        seen.append((torch._C._current_graph_task_id() != -1, self.record_logits))
        return route(self, x)

    def stepped(self: LteTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = step(self, *args, **kwargs)
        left.extend(ffn.logits for ffn in self.ffns)
        return loss

    monkeypatch.setattr(SparseFfn, "_route", routed)
    monkeypatch.setattr(LteTrainer, "training_step", stepped)
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: function)
    options = {"compile": True, "gradient_checkpointing": True, "router_fit_tokens": 0, "calibration_tokens": 0}
    train(rows_of([LONGEST] * 8), tmp_path, **options)
    assert (True, True) in seen
    assert (True, False) not in seen
    # Their logits would keep all activations until the end of the backward pass.
    assert left
    assert not any(each is not None for each in left)


def test_a_model_with_checkpointing_of_its_own_trains_compiled_more_than_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Trainer sets checkpointing anew for each training where it is its own.
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: function)
    model = tiny_dense_model().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.arange(3, 15)[None]

    def gradient() -> torch.Tensor:
        loss = model(ids, labels=ids, use_cache=False).loss
        return torch.autograd.grad(loss, model.model.layers[0].self_attn.q_proj.weight)[0]

    wanted = gradient()
    for _ in range(2):
        checkpoint_compiled_(model)
        assert torch.equal(gradient(), wanted)


@pytest.mark.parametrize(("compiled", "batches"), [(True, 2), (False, 3)])
def test_the_last_batch_is_left_out_where_layers_are_compiled(
    tmp_path: Path, compilations: CompileCounter, compiled: bool, batches: int
) -> None:
    _, summary = train(rows_of([LONGEST] * 10), tmp_path, compile=compiled)
    assert summary.log_history[-1]["step"] == 2 * batches


def test_fewer_rows_than_a_batch_are_trained_on(tmp_path: Path, compilations: CompileCounter) -> None:
    _, summary = train(rows_of([LONGEST] * 3), tmp_path, compile=True)
    assert summary.log_history[-1]["step"] == 2
