"""What a model is, from its config alone: as JSON, and as tables in the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from lte.config import LteConfig
from lte.eval.cost import method_name
from lte.eval.flops import GFLOP, count_linear_weights, flops_per_token, meta_model
from lte.eval.models import is_lte, load_config
from lte.hf.families import dense_ffns, family_of
from lte.hf.install import num_neurons, sparse_ffns, wrapped_ffns
from lte.methods import METHODS, config_of


def print_description(found: dict[str, Any]) -> None:
    """Prints what `describe` returned."""
    console = Console()
    console.print(_summary_table(found))
    if found["layers_measured"]:
        console.print(_layer_table(found["layers_measured"]))
    elif found["method"] in METHODS:
        console.print("No sparsity was measured for this folder; `lte eval` measures it.")
    for ability in found["abilities"]:
        console.print(f"- {ability}")
    if found["method"] not in METHODS:
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
    method = METHODS.get(found["method"])
    found["abilities"] = [] if method is None else method.abilities()
    if method is not None:
        found |= {"about": method.about, **_describe_method(config, skeleton)}
    return {**found, **_describe_experts(config, skeleton)} if is_lte(config) else found


def _describe_method(config: Any, skeleton: Any) -> dict[str, Any]:
    """The settings of the model's method, and what was measured of it."""
    method_config, measured = config_of(skeleton), getattr(config, "lte_measurement", None)
    return {
        **({} if method_config is None else method_config.to_dict()),
        "measured_sparsity": measured["sparsity"] if measured else None,
        "measured_tokens": measured["tokens"] if measured else None,
        "measured_on": measured["split"] if measured else None,
        "layers_measured": _layers(measured) if measured else [],
    }


def _describe_experts(config: Any, skeleton: Any) -> dict[str, Any]:
    target = LteConfig.from_dict(config.lte).target_sparsity
    measured = config.lte_measurement
    by_layer = [1 - share for share in measured["active_fraction"]] if measured else None
    sparsity = by_layer or target
    ffn = next(iter(sparse_ffns(skeleton).values()))
    return {
        "experts_per_layer": ffn.num_experts,
        "router_parameters": sum(count_linear_weights(skeleton).router),
        "gflops_per_token_sparse": flops_per_token(skeleton, sparsity) / GFLOP,
    }


def _layers(measured: dict[str, Any]) -> list[dict[str, Any]]:
    columns = [name for name in ("active_fraction", "dead_experts", "always_on_experts") if name in measured]
    rows = zip(*(measured[name] for name in columns), strict=True)
    return [{"layer": i, **dict(zip(columns, row, strict=True))} for i, row in enumerate(rows)]


def _summary_table(found: dict[str, Any]) -> Table:
    table = Table(show_header=False, title=found["model"], title_justify="left")
    table.add_row("method", found["method"])
    table.add_row("base family", found["family"])
    table.add_row("layers x FFN neurons", f"{found['layers']} x {found['ffn_neurons']}")
    table.add_row("parameters", f"{found['parameters']:,}")
    dense = f"{found['gflops_per_token_dense']:.4f} dense"
    if found["method"] in METHODS:
        table.add_row("skips", found["about"])
    if "experts_per_layer" in found:
        rank = found["router_rank"] or "full"
        table.add_row("experts per layer", f"{found['experts_per_layer']} of {found['expert_size']} neurons")
        table.add_row("grouping", found["grouping"])
        table.add_row("router", f"rank {rank}, threshold {found['threshold']:g}")
        table.add_row("router parameters", f"{found['router_parameters']:,}")
        at = "measured" if found["measured_sparsity"] is not None else "target"
        dense += f", {found['gflops_per_token_sparse']:.4f} at the {at} sparsity, routers included"
    if found["method"] in METHODS:
        table.add_row("target sparsity", f"{100 * found['target_sparsity']:g}%")
        if not METHODS[found["method"]].leaves_stock:
            table.add_row("measured sparsity", _measured(found))
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
        experts = [str(row.get(name, "-")) for name in ("dead_experts", "always_on_experts")]
        table.add_row(str(row["layer"]), active, *experts)
    return table
