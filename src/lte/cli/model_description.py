"""What a model is, from its config alone: as JSON, and as tables in the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from lte.config import LteConfig
from lte.eval.flops import GFLOP, count_linear_weights, flops_per_token, meta_model
from lte.eval.methods import method_name
from lte.eval.models import is_lte, load_config
from lte.hf.families import dense_ffns, family_of
from lte.hf.install import num_neurons, sparse_ffns, wrapped_ffns


def print_description(found: dict[str, Any]) -> None:
    """Prints what `describe` returned."""
    console = Console()
    console.print(_summary_table(found))
    if found["layers_measured"]:
        console.print(_layer_table(found["layers_measured"]))
    elif found["method"] == "lte":
        console.print("No sparsity was measured for this folder; `lte eval` measures it.")
    elif found["method"] != "dense":
        console.print(f"This model is of the method {found['method']}; `lte eval` measures what it costs.")
    else:
        console.print("This model is dense: every token uses all its FFN neurons. `lte train` makes it sparse.")


def describe(name_or_path: str) -> dict[str, Any]:
    """Everything that the config of a model tells, JSON-ready.

    Raises:
        ValueError: for an unknown family, or a path that does not exist.
    """
    config = load_config(name_or_path)
    family = family_of(config)
    skeleton = meta_model(config)
    weights = count_linear_weights(skeleton)
    first = next(iter((wrapped_ffns(skeleton) or dense_ffns(skeleton, family)).values()))
    found: dict[str, Any] = {
        "model": name_or_path,
        "method": method_name(skeleton),
        "family": family.model_type,
        "layers": len(weights.ffn),
        "hidden_size": config.hidden_size,
        "ffn_neurons": num_neurons(first, family.layout),
        "parameters": sum(parameter.numel() for parameter in skeleton.parameters()),
        "gflops_per_token_dense": 2 * (weights.attention + sum(weights.ffn)) / GFLOP,
        "layers_measured": [],
    }
    return {**found, **_describe_experts(config, skeleton)} if is_lte(config) else found


def _describe_experts(config: Any, skeleton: Any) -> dict[str, Any]:
    lte_config = LteConfig.from_dict(config.lte)
    measured = config.lte_measurement
    by_layer = [1 - share for share in measured["active_fraction"]] if measured else None
    sparsity = by_layer or lte_config.target_sparsity
    ffn = next(iter(sparse_ffns(skeleton).values()))
    return {
        "experts_per_layer": ffn.num_experts,
        "router_parameters": sum(count_linear_weights(skeleton).router),
        **lte_config.to_dict(),
        "measured_sparsity": measured["sparsity"] if measured else None,
        "measured_tokens": measured["tokens"] if measured else None,
        "measured_on": measured["split"] if measured else None,
        "gflops_per_token_sparse": flops_per_token(skeleton, sparsity) / GFLOP,
        "layers_measured": _layers(measured) if measured else [],
    }


def _layers(measured: dict[str, Any]) -> list[dict[str, Any]]:
    columns = ("active_fraction", "dead_experts", "always_on_experts")
    rows = zip(*(measured[name] for name in columns), strict=True)
    return [{"layer": i, **dict(zip(columns, row, strict=True))} for i, row in enumerate(rows)]


def _summary_table(found: dict[str, Any]) -> Table:
    table = Table(show_header=False, title=found["model"], title_justify="left")
    table.add_row("method", found["method"])
    table.add_row("base family", found["family"])
    table.add_row("layers x FFN neurons", f"{found['layers']} x {found['ffn_neurons']}")
    table.add_row("parameters", f"{found['parameters']:,}")
    dense = f"{found['gflops_per_token_dense']:.4f} dense"
    if found["method"] == "lte":
        rank = found["router_rank"] or "full"
        table.add_row("experts per layer", f"{found['experts_per_layer']} of {found['expert_size']} neurons")
        table.add_row("grouping", found["grouping"])
        table.add_row("router", f"rank {rank}, threshold {found['threshold']:g}")
        table.add_row("router parameters", f"{found['router_parameters']:,}")
        table.add_row("target sparsity", f"{100 * found['target_sparsity']:g}%")
        table.add_row("measured sparsity", _measured(found))
        at = "measured" if found["measured_sparsity"] is not None else "target"
        dense += f", {found['gflops_per_token_sparse']:.4f} at the {at} sparsity, routers included"
    table.add_row("GFLOPs per token", f"{dense} (block linears, 1 G = 2^30)")
    return table


def _measured(found: dict[str, Any]) -> str:
    if found["measured_sparsity"] is None:
        return "not measured"
    tokens = f"{found['measured_tokens']} {found['measured_on']} tokens"
    return f"{100 * found['measured_sparsity']:.2f}% ({tokens}, hard mode)"


def _layer_table(layers: list[dict[str, Any]]) -> Table:
    table = Table(title="by layer", title_justify="left")
    for heading in ("layer", "active neurons", "dead experts", "always-on experts"):
        table.add_column(heading, justify="right")
    for row in layers:
        active = f"{100 * row['active_fraction']:.1f}%"
        table.add_row(str(row["layer"]), active, str(row["dead_experts"]), str(row["always_on_experts"]))
    return table
