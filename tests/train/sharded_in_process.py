"""One process of `test_sharded`: trains tiny models, one case after the other, and saves what came of each.

A case is what accelerate's launcher would set in the environment, a method, the settings of a training, and whether it
goes on from the checkpoints of another case.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

import lte
from lte.methods import METHODS
from lte.nn.router import Router
from lte.nn.shards import assign_, whole
from lte.train import two_stage
from lte.train.adapters import merge_sharded_lora, with_lora
from lte.train.config import TrainConfig
from lte.train.processes import training_device
from lte.train.sharding import gathered, is_in_shards
from lte.train.trainer import LteTrainer
from lte.train.two_stage import train_two_stage
from tests.processes import ON_GPUS, connect
from tests.tiny_models import tiny_dense_model
from tests.train.toy import toy_rows, uneven_toy_rows

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": ""}
ZERO |= {} if ON_GPUS else {"DS_ACCELERATOR": "cpu"}


# Of each training with DDP in this process, whether its gradients lie in DDP's buckets alone.
gradients_in_buckets: list[bool] = []


class RecordedDataParallel(DistributedDataParallel):
    """Remembers where its gradients lie."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        gradients_in_buckets.append(self.gradient_as_bucket_view)


class Stopped(Exception):
    """Ends a training."""


class StopAt(TrainerCallback):
    """Ends a training as an error in all processes would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Stopped


class OnCpus(LteTrainer):
    """Makes accelerate, which shards models of processes with GPUs alone, do so on CPUs."""

    def create_accelerator_and_postprocess(self) -> None:
        if os.environ.get("ACCELERATE_USE_FSDP"):
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        if os.environ.get("ACCELERATE_USE_DEEPSPEED"):
            os.environ["ACCELERATE_USE_CPU"] = "false"
        super().create_accelerator_and_postprocess()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and isinstance(plugin.cpu_offload, CPUOffloadPolicy):
            # Memory is pinned for a GPU alone.
            plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)


def model_of(case: dict[str, Any], folder: Path) -> Any:
    torch.manual_seed(0)
    model = tiny_dense_model(case.get("family", "llama"), **case.get("sizes", {}))
    method = case.get("method", "lte")
    if method != "dense":
        settings = {"expert_size": 8, "grouping": "random", "target_sparsity": 0.5, **case.get("config", {})}
        model = lte.sparsify_(model, METHODS[method].config(**settings))
    return model


def decisions(model: Any) -> Tensor | None:
    """Which experts are on for some text, bool [L, B, T, E]."""
    ffns = list(lte.sparse_ffns(model).values())
    for ffn in ffns:
        ffn.record_logits = True
    with torch.no_grad():
        ids = torch.tensor(np.array(toy_rows(8, seed=5).input_ids))
        model.eval()(ids.to(next(model.parameters()).device))
    found = [(ffn.logits > ffn.threshold_logit).cpu() for ffn in ffns if ffn.logits is not None]
    return torch.stack(found) if found else None


def note_dtype(found: dict[type, set[str]], module: Any, args: Any) -> None:
    if module.training:
        found[Router if isinstance(module, Router) else torch.nn.Linear].add(str(module.weight.dtype))


def assigned() -> Tensor:
    """A parameter in parts that each process has set to its own number."""
    mesh = init_device_mesh(training_device().type, (dist.get_world_size(),))
    parameter = distribute_tensor(torch.zeros(3, 2), mesh, [Shard(0)])
    assign_(parameter, torch.full((3, 2), 1.0 + dist.get_rank()))
    return whole(parameter).cpu()


def run(case: dict[str, Any], root: Path) -> dict[str, Any]:
    for name in (*FSDP, *ZERO):
        os.environ.pop(name, None)
    os.environ.update({**FSDP, **case["fsdp"]} if "fsdp" in case else {})
    if "zero" in case:
        settings = {"zero_optimization": {"stage": case["zero"]}, "zero_force_ds_cpu_optimizer": False}
        settings |= dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
        # Of its own: the others would read what this process has not written whole yet.
        path = root / f"zero{case['zero']}_{dist.get_rank()}.json"
        root.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**settings, "gradient_clipping": "auto"}))
        os.environ.update({**ZERO, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)})
        from deepspeed.ops import __compatible_ops__

        # DeepSpeed would compile its own sums in shared memory first.
        __compatible_ops__["deepspeed_shm_comm"] = False
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if case["train"].get("bf16") else "no"
    PartialState._reset_state()
    AcceleratorState._reset_state()
    GradientState._reset_state()
    folder = root / case.get("folder", case["name"])
    passes = case["train"].get("gradient_accumulation_steps", 1)
    rows_each = 8 // passes // dist.get_world_size()
    config = TrainConfig(**case["train"], batch_size=rows_each, report_to="none")
    model = model_of(case, folder)
    if config.lora_rank:
        model = with_lora(model, config, folder)
    stop = case.get("stop_at")
    callbacks = [StopAt(stop)] if stop else []
    rows = uneven_toy_rows() if case.get("uneven") else toy_rows()
    dtypes: dict[type, set[str]] = {Router: set(), torch.nn.Linear: set()}
    for module in model.model.modules() if "bf16" in case["name"] or config.bf16 else ():
        if type(module) in dtypes:
            # In the module's own pass, when its weights are there; in evaluation they are in fp32.
            module.register_forward_pre_hook(partial(note_dtype, dtypes))
    gradients_in_buckets.clear()
    try:
        summary = train_two_stage(model, rows, config, folder, resume=bool(case.get("resume")), callbacks=callbacks)
        log = summary.log_history
    except Stopped:
        log = []
    made = None
    if is_in_shards(model):
        made = merge_sharded_lora(model, folder) if config.lora_rank else gathered(model)
    state = {name: whole(tensor).detach().cpu().clone() for name, tensor in model.state_dict(keep_vars=True).items()}
    kinds = sorted({type(parameter).__name__ for parameter in model.parameters()})
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return {
        "weights": state,
        "log": log,
        "kinds": kinds,
        "gradients_in_buckets": list(gradients_in_buckets),
        "files": files,
        "decisions": None if case.get("zero") == 3 else decisions(model),
    } | {
        "made": None if made is None else {name: tensor.cpu().clone() for name, tensor in made.state_dict().items()},
        "made_decisions": None if made is None else decisions(made.to(training_device())),
        "router_dtypes": sorted(dtypes[Router]),
        "layer_dtypes": sorted(dtypes[torch.nn.Linear]),
    }


if __name__ == "__main__":
    if not ON_GPUS:
        two_stage.LteTrainer = OnCpus  # type: ignore[misc]
    torch.nn.parallel.DistributedDataParallel = RecordedDataParallel  # type: ignore[misc]
    root, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    # On a CPU each shape that torchao's optimisers compile takes seconds.
    torch.compile = lambda function, *args, **kwargs: function  # type: ignore[assignment]
    # As accelerate: what lies on the CPU is summed by gloo.
    offloads = any("FSDP_OFFLOAD_PARAMS" in case.get("fsdp", {}) for case in cases)
    connect("cpu:gloo,cuda:nccl" if offloads else "nccl")
    for case in cases:
        found = run(case, root)
        out = root / case["name"]
        out.mkdir(parents=True, exist_ok=True)
        torch.save(found, out / f"rank{dist.get_rank()}.pt")
    torch.save(assigned(), root / f"assigned{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()
