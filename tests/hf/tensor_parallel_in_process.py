"""One process of `test_tensor_parallel`: loads tiny models in parts, and saves what they compute, by kernels, too."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, distribute_tensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import lte
from lte.eval.sparsity import measure_sparsity
from lte.hf.threshold import set_threshold_
from lte.nn.accelerated import AcceleratedFfn
from lte.nn.shards import is_sharded, local, whole
from lte.ops.dispatch import FfnRunner
from lte.train.processes import training_device
from tests.processes import connect
from tests.tiny_models import VOCAB

# Of a family without a plan, whose FFN lies in its block.
PLANS = {"opt": {"model.decoder.layers.*.fc1": "colwise", "model.decoder.layers.*.fc2": "rowwise"}}


def load(folder: Path) -> Any:
    """A model in parts."""
    plan = DistributedConfig(tp_plan=PLANS.get(folder.name, "auto"))  # type: ignore[arg-type]
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=plan).eval()


@contextmanager
def counted() -> Iterator[list[int]]:
    """Counts the tokens of the kernels' calls."""
    found: list[int] = []
    call = FfnRunner.__call__

    def count(runner: FfnRunner, x: Tensor, *given: Any) -> Tensor:
        found.append(len(x))
        return call(runner, x, *given)

    with mock.patch.object(FfnRunner, "__call__", count):
        yield found


@torch.no_grad()
def computed(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """The logits of many tokens and of few ones, and an answer."""
    answer = model.generate(tokens[:1, :4], max_new_tokens=8, do_sample=False)
    logits = {"logits": whole(model(tokens).logits), "few": whole(model(tokens[:, :3]).logits)}
    return {"answer": answer.cpu(), **{name: each.cpu() for name, each in logits.items()}}


@torch.no_grad()
def changed(folder: Path, tokens: Tensor) -> dict[str, Any]:
    """What becomes of the model in `folder` when it is accelerated and then changed, saved, undone and so on."""
    model, found = load(folder), {}
    before = whole(model(tokens).logits)
    lte.accelerate_(model)
    model.save_pretrained(folder.parent / "saved")
    with counted() as calls:
        found["compiled"] = whole(torch.compile(model, backend="eager")(tokens[:, :3]).logits).cpu()
    found["compiled calls"] = calls
    found["sparsity"] = measure_sparsity(model, [{"input_ids": tokens}]).sparsity
    set_threshold_(model, 0.7)
    found["threshold"] = whole(model(tokens[:, :3]).logits).cpu()
    set_threshold_(model, 0.5)
    lte.decelerate_(model)
    found["undone"] = torch.equal(whole(model(tokens).logits), before)
    found["contiguous"] = all(local(parameter).is_contiguous() for parameter in model.parameters())
    with mock.patch.object(AcceleratedFfn, "_lay_out_", side_effect=MemoryError), counted() as calls:
        for weights in ("native", "int8"):
            try:
                lte.accelerate_(model, weights)  # type: ignore[arg-type]
            except MemoryError:
                found[f"failed {weights}"] = torch.equal(whole(model(tokens).logits), before) and not calls
    lte.accelerate_(model, "int8")
    found["int8"] = whole(model(tokens[:, :3]).logits).cpu()
    lte.decelerate_(model)
    found["dense"] = whole(lte.densify_(lte.accelerate_(model))(tokens).logits).cpu()
    model = load(folder)
    part = next(iter(lte.sparse_ffns(model).values())).up_proj
    mesh = part.weight.device_mesh
    part.weight = nn.Parameter(distribute_tensor(whole(part.weight), mesh, [Replicate()]))
    try:
        lte.accelerate_(model)
    except ValueError as error:
        found["other split"] = str(error)
    return found


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2].split(",")
    torch.set_num_threads(1)
    connect()
    tokens = torch.arange(48, device=training_device()).reshape(2, 24) % VOCAB
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            model = load(folder / name)
        except ValueError as error:
            found[name] = {"error": str(error)}
            continue
        ffn = next(iter(lte.sparse_ffns(model).values()))
        found[name] = {"down": is_sharded(ffn.part(ffn.layout.down).weight), "router": is_sharded(ffn.router.weight)}
        found[name]["masked"] = computed(model, tokens)
        try:
            lte.accelerate_(model)
        except ValueError as error:
            found[name]["refused"] = str(error)
            continue
        with counted() as found[name]["calls"]:
            found[name]["kernels"] = computed(model, tokens)
    if dist.get_world_size() == 2:
        found["changed"] = changed(folder / "llama", tokens)
    torch.save(found, folder / f"found{dist.get_world_size()}_{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
