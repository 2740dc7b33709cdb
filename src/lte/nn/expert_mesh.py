"""Which processes share an FFN under tensor parallelism, and which part of it each of them has.

Shapes: E experts.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from lte.nn.shards import is_sharded
from lte.nn.sparse_ffn import SparseFfn, check_expert_shares

_RULE = "each process must hold whole experts"
_WITHOUT = "run the model without accelerate_, or load it whole, without a tp_plan"


def expert_mesh(ffn: SparseFfn) -> DeviceMesh | None:
    """The processes that share an FFN, each with whole experts; `None` if it lies whole in each process.

    Raises:
        ValueError: for an FFN in parts of another kind.
    """
    if not any(is_sharded(parameter) for parameter in ffn.own_parameters()):
        return None
    layout = ffn.layout
    if layout.fused or ffn.block:
        kind = "gate and up are one projection" if layout.fused else "parts lie in its block"
        raise ValueError(f"{_RULE}, got an FFN whose {kind}; {_WITHOUT}")
    meshes = []
    for name in layout.projections:
        # The router's experts are those of the neurons: rows of gate and up with their biases, columns of down.
        held = {"weight": Shard(1 if name == layout.down else 0), "bias": None if name == layout.down else Shard(0)}
        for kind, wanted in held.items():
            tensor = ffn.part(name)._parameters.get(kind)
            if tensor is None:
                continue
            placements = tensor.placements if isinstance(tensor, DTensor) else ()
            sharded = [placement for placement in placements if not placement.is_replicate()]
            if sharded != [wanted] * (wanted is not None) or (wanted is not None and len(placements) > 1):
                raise ValueError(f"{_RULE}, got {name}.{kind} with placements={list(placements)}; {_WITHOUT}")
            if isinstance(tensor, DTensor):
                meshes.append(tensor.device_mesh)
    if any(is_sharded(parameter) for parameter in ffn.router.parameters()):
        raise ValueError(f"routers must lie whole in each process, got one in parts; {_WITHOUT}")
    mesh = meshes[0]
    if any(other != mesh for other in meshes):
        raise ValueError(f"projections must all be split over the same processes, got several meshes; {_WITHOUT}")
    check_expert_shares(ffn.num_experts, mesh.size())
    return mesh


def own_experts(tensor: Tensor, mesh: DeviceMesh | None, dim: int = 0) -> Tensor:
    """Of a tensor whose dimension `dim` counts experts those of this process, a view."""
    return tensor if mesh is None else tensor.chunk(mesh.size(), dim)[mesh.get_local_rank()]


def forward_of_plan(module: nn.Module) -> Any:
    """The forward method that a tensor parallel plan of transformers gave a module, `None` for any other.

    It splits what goes in and adds up what comes out, as the FFN itself does where it runs on the kernels.
    """
    found = module.__dict__.get("forward")
    ours = isinstance(module._parameters.get("weight"), DTensor)
    return found if ours and getattr(found, "__module__", "").startswith("transformers.distributed.") else None
