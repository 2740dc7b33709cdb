"""What `lte inspect` does: it says what a folder holds, and which experts the tokens of a text switch on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
import typer
from rich.console import Console
from rich.table import Table

from lte.cli.calibration import curve_table
from lte.cli.command import read_text_file
from lte.cli.inspect import TextConfig
from lte.config import GFLOP, LteConfig
from lte.eval.cost import method_name
from lte.eval.flops import count_linear_weights, flops_per_token, meta_model
from lte.eval.kernels import use_kernels_
from lte.eval.models import DTYPES, is_lte, load_config
from lte.files import write_text_atomic
from lte.hf.checkpoints import load_whole, read_checksums, reading
from lte.hf.dense import load_tokenizer, model_location
from lte.hf.families import dense_ffns, family_of, saved_head
from lte.hf.install import num_neurons, sparse_ffns, wrapped_ffns
from lte.hf.sparsity_curve import describe_choice, readable_curve
from lte.hf.verify import loading_fault
from lte.hf.verify import verify as verify_folder
from lte.methods import METHODS, config_of
from lte.report.inspector import Inspector, NamedText, inspector_data, inspector_page
from lte.report.inspector_server import InspectorServer
from lte.train.processes import training_device


def verify_files(name_or_path: str) -> None:
    """Compares a folder with its checksums and says that it is whole.

    Raises:
        ValueError: if it is not, naming the files.
    """
    found = verify_folder(name_or_path)
    if found:
        raise ValueError(f"model must be as it was saved, got {name_or_path}, where {'; '.join(found)}")
    known = read_checksums(Path(name_or_path).expanduser())
    if known is None:
        typer.echo(
            f"{name_or_path} holds a whole model of finite weights. It has no checksums, since lte 0.1 or another tool "
            "saved it, so that changed bits stay unknown; saving it again with lte writes them."
        )
    else:
        typer.echo(f"{name_or_path} is as it was saved: {len(known)} files, by their checksums.")


def check_method(name_or_path: str, method: str) -> None:
    """Refuses a model without routers.

    Raises:
        ValueError: for a dense model, or one of another method.
    """
    if method not in METHODS:
        raise ValueError(
            f"model must be an LTE model to inspect a text, got {name_or_path}, a dense one: every token uses all its "
            "neurons, so there is nothing to inspect; `lte train` makes it sparse"
        )
    if not METHODS[method].sparse_ffns:
        raise ValueError(
            f"model must be an LTE model to inspect a text, got {name_or_path} of the method {method}, which has no "
            f"routers of LTE and skips {METHODS[method].about}; `lte eval` measures what it costs"
        )


def load_inspected_model(name_or_path: str, dtype: str, kernels: str) -> Any:
    """An LTE model of any kind with the head that its folder holds, on the GPU if there is one."""
    config = load_config(name_or_path)
    auto_class = getattr(transformers, saved_head(config) or next(iter(family_of(config).models)))
    model = load_whole(auto_class, model_location(name_or_path), dtype=DTYPES[dtype])
    return use_kernels_(model.to(training_device()).eval(), kernels)


def read_text(path: str, flag: str) -> NamedText:
    """The text in a UTF-8 file, under the file's name.

    Raises:
        ValueError: for a file that does not exist or is no UTF-8.
    """
    return NamedText(Path(path).name, read_text_file(flag, path))


def write_inspector(model: str, method: str, config: TextConfig) -> None:
    """Writes the page of a text to a file and says what it holds."""
    assert config.text is not None
    assert config.html is not None
    text = read_text(config.text, "--text")
    check_method(model, method)
    texts = [text]
    if config.compare_text is not None:
        texts.append(read_text(config.compare_text, "--compare-text"))
    if config.compare_model is not None:
        check_method(config.compare_model, describe(config.compare_model)["method"])
    models = [model] if config.compare_model is None else [model, config.compare_model]
    recorded = [
        run for each, name in zip(models, _names(models), strict=True) for run in _record(each, name, texts, config)
    ]
    path = Path(config.html).expanduser()
    write_text_atomic(path, inspector_page(inspector_data(recorded)))
    for run in recorded:
        _tell(run)
    typer.echo(f"Wrote {path}; open it in a browser.")


def _record(model: str, name: str, texts: list[NamedText], config: TextConfig) -> list[dict[str, Any]]:
    inspector = _inspector(model, name, config)
    return [inspector.run(text) for text in texts]


def _inspector(model: str, name: str, config: TextConfig) -> Inspector:
    reference = None if config.reference is None else read_text(config.reference, "--reference")
    loaded = load_inspected_model(model, config.dtype, config.kernels)
    return Inspector(loaded, load_tokenizer(model), name, config.max_tokens, reference)


def _names(models: list[str]) -> list[str]:
    """The names of folders alone: a page that is passed on need not tell where they were, unless two are alike."""
    paths = [Path(model).expanduser() for model in models]
    names = [path.resolve().name if path.exists() else model for path, model in zip(paths, models, strict=True)]
    return names if len(set(names)) == len(set(models)) else models


def _tell(run: Mapping[str, Any]) -> None:
    for shown in (run, run["reference"]):
        for note in shown["notes"]:
            typer.echo(f"{shown['text']}: {note}", err=True)
    used = f"{100 * (1 - run['sparsity']):.1f}% of the FFN neurons were used per token"
    typer.echo(f"{run['text']} on {run['model']}: {len(run['ids']):,} tokens, {used}.")


def serve_inspector(model: str, method: str, config: TextConfig) -> None:
    """Serves the page until Ctrl-C."""
    check_method(model, method)
    given = [(config.text, "--text"), (config.compare_text, "--compare-text")]
    texts = [read_text(path, flag) for path, flag in given if path is not None]
    inspector = _inspector(model, _names([model])[0], config)
    runs = [inspector.run(text) for text in texts]
    for run in runs:
        _tell(run)
    with InspectorServer(inspector, config.port, runs) as server:
        typer.echo(f"Open {server.url} in a browser of this machine; Ctrl-C ends it.")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            typer.echo("Stopped.")


def print_description(found: dict[str, Any]) -> None:
    """Prints what `describe` returned."""
    console = Console()
    console.print(_summary_table(found))
    curve = readable_curve(found.get("curve"))
    if curve is None and found.get("curve") is not None:
        console.print("This lte cannot read the curve over the threshold; `lte calibrate` measures it anew.")
    if curve is not None:
        console.print(curve_table(curve, found["threshold"], "over the threshold, on the texts of `lte calibrate`"))
        if found["threshold_choice"] is not None:
            console.print(found["threshold_choice"], highlight=False, soft_wrap=True)
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

    `fault` says why the model does not load; it is `None` if it does.

    Raises:
        ValueError: for an unknown family, or a path that does not exist.
    """
    config = load_config(name_or_path)
    family = family_of(config)
    with reading(name_or_path):
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
        "fault": loading_fault(name_or_path),
        "layers_measured": [],
    }
    method = METHODS.get(found["method"])
    found["abilities"] = [] if method is None else method.abilities()
    if method is not None:
        method_config, measured = config_of(skeleton), getattr(config, "lte_measurement", None) or {}
        found |= {
            "about": method.about,
            **({} if method_config is None else method_config.to_dict()),
            "measured_sparsity": measured.get("sparsity"),
            "measured_tokens": measured.get("tokens"),
            "measured_on": measured.get("split"),
            "layers_measured": _layers(measured),
            "measured_interpolated": bool(measured.get("interpolated")),
            "curve": getattr(config, "lte_curve", None),
            "threshold_choice": describe_choice(config),
        }
    return {**found, **_describe_experts(config, skeleton)} if is_lte(config) else found


def _describe_experts(config: Any, skeleton: Any) -> dict[str, Any]:
    target = LteConfig.from_dict(config.lte).target_sparsity
    measured = config.lte_measurement or {}
    sparsity = [1 - share for share in measured.get("active_fraction", ())] or target
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
    if found["fault"] is not None:
        table.add_row("loads", f"no: {found['fault']}")
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
            tokens = f"{found['measured_tokens']} {found['measured_on']} tokens"
            share = found["measured_sparsity"]
            how = "interpolated on its curve" if found["measured_interpolated"] else "hard mode"
            measured = "not measured" if share is None else f"{100 * share:.2f}% ({tokens}, {how})"
            table.add_row("measured sparsity", measured)
    table.add_row("GFLOPs per token", f"{dense} (block linears, 1 G = 2^30)")
    return table


def _layer_table(layers: list[dict[str, Any]]) -> Table:
    table = Table(title="by layer", title_justify="left")
    for heading in ("layer", "active neurons", "dead experts", "always-on experts"):
        table.add_column(heading, justify="right")
    for row in layers:
        active = f"{100 * row['active_fraction']:.1f}%"
        experts = [str(row.get(name, "-")) for name in ("dead_experts", "always_on_experts")]
        table.add_row(str(row["layer"]), active, *experts)
    return table
