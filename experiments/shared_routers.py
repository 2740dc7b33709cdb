"""How far routers alone make neighbouring tokens share experts: single FFNs of a dense model, their weights frozen.

    python experiments/shared_routers.py qwen2.5-coder-0.5b.gguf --train train.jsonl --held-out valid.jsonl \\
        --output results/unions/shared_routers_0_5b.json

A router is trained for one FFN at a time. Its loss is the error of the FFN's output, ||y - y_sparse||^2 / ||y||^2 for
each token, with decisions straight through as in stage 2, plus the price that holds the target and what the setting
under test adds. The error is a quadratic form in which experts are off, so tokens are computed once and thousands of
steps take minutes on a CPU. Error and unions are those of other documents, at the threshold which has the target off
there: settings are compared at equal sparsity.

What a model makes up for by training its other weights is not in it: it says what settings do to routers, and which are
worth a training. A weight counts beside this error, not beside the loss of a model; `eta`, the weight that the price
needs to hold the target, tells how the two compare.

Shapes: N documents, T tokens, D hidden size, F neurons, E experts.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lte import LteConfig
from lte.data.files import open_table
from lte.files import write_json_atomic
from lte.hf.convert import collectors, down_norms, neuron_order
from lte.hf.dense import load_dense_model, load_tokenizer
from lte.hf.families import dense_ffns, family_of
from lte.hf.install import check_reachable
from lte.nn.hooks import before_each_call
from lte.nn.losses import active_fraction, efficiency_loss
from lte.nn.router import INITIAL_LOGIT, Router
from lte.nn.router_context import mean_before
from lte.nn.unions import off_in_a_row
from lte.records import environment
from lte.train.added_terms import AddedTerms, added_terms, weighted_sum
from lte.train.sparsity_controller import EtaController

UNIONS = (2, 4, 8, 16)
RAMP = 0.4  # share of the steps in which the target rises


@dataclass(frozen=True)
class Setting:
    """What is tried, named as in `experiments/recipe/company.yaml`.

    Attributes:
        name: of the row.
        grouping: of neurons into experts.
        always_on: share of experts that are on for every token, those of the neurons that are used most.
        context: tokens before that the router sees.
        terms: added to the loss.
    """

    name: str
    grouping: str = "contribution"
    always_on: float = 0.0
    context: int = 0
    terms: AddedTerms = field(default_factory=AddedTerms)


SETTINGS = (
    Setting("default"),
    *(Setting(f"union-{w:g}", terms=AddedTerms(union=w)) for w in (0.03, 0.1, 0.3, 1.0)),
    *(Setting(f"predecessor-{w:g}", terms=AddedTerms(predecessor=w)) for w in (0.1, 0.3, 1.0)),
    Setting("price-union", terms=AddedTerms(priced_chunks=True)),
    *(Setting(f"core-{percent}", always_on=percent / 100) for percent in (10, 30)),
    Setting("core-10-and-union-0.1", always_on=0.1, terms=AddedTerms(union=0.1)),
    *(
        Setting(f"core-{percent}-and-union-0.3", always_on=percent / 100, terms=AddedTerms(union=0.3))
        for percent in (10, 30)
    ),
    *(Setting(f"context-{n}", context=n) for n in (4, 16)),
    Setting("context-16-and-price", context=16, terms=AddedTerms(priced_chunks=True)),
    Setting("context-16-and-union-0.3", context=16, terms=AddedTerms(union=0.3)),
    Setting("chunks", grouping="chunks"),
    Setting("chunks-and-union-0.1", grouping="chunks", terms=AddedTerms(union=0.1)),
    Setting("chunks-and-price", grouping="chunks", terms=AddedTerms(priced_chunks=True)),
)


@dataclass(frozen=True)
class Tokens:
    """What an FFN does to some tokens.

    Attributes:
        x: its input [N, T, D].
        products: <y_e, y_f> / ||y||^2 of the outputs y_e of its experts, [N, T, E, E].
    """

    x: Tensor
    products: Tensor


def documents(path: Path, tokenizer: Any, count: int, length: int) -> Tensor:
    """The first tokens of the first documents that have as many, [count, length]."""
    rows: list[list[int]] = []
    for _, row in open_table(path, "jsonl").read(["text"]):
        ids = tokenizer(row["text"])["input_ids"]
        if len(ids) >= length:
            rows.append(ids[:length])
        if len(rows) == count:
            return torch.tensor(rows)
    raise SystemExit(f"{path} must have {count} documents of {length} tokens, got {len(rows)}")


class _Seen(Exception):
    """All that is wanted of a pass is there."""


@torch.no_grad()
def inputs_of(model: Any, names: list[str], ids: Tensor) -> dict[str, Tensor]:
    """The inputs [N, T, D] of the named FFNs, of which the last one lies deepest."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str, args: tuple[Any, ...]) -> None:
        found[name].append(args[0])
        if name == names[-1]:
            raise _Seen

    with before_each_call({name: model.get_submodule(name) for name in names}, keep):
        for rows in ids.split(8):
            with suppress(_Seen):
                model.model(input_ids=rows, use_cache=False)
    return {name: torch.cat(values) for name, values in found.items()}


def hidden(ffn: Any, x: Tensor) -> Tensor:
    """Activations [..., F] of a gated FFN."""
    return ffn.act_fn(ffn.gate_proj(x)) * ffn.up_proj(x)


@torch.no_grad()
def order_of(ffn: Any, x: Tensor, config: LteConfig) -> Tensor:
    """The neurons [F] in the order of their experts, by what they did on x."""
    seen = collectors(config, down_norms(ffn.down_proj.weight))
    for rows in x.split(4):
        seen.update(hidden(ffn, rows), torch.ones(rows.shape[:2], dtype=torch.bool))
    return neuron_order(ffn.gate_proj.weight, config, 0, seen)


@torch.no_grad()
def tokens_of(ffn: Any, x: Tensor, order: Tensor, size: int) -> Tokens:
    """The tokens with experts of `size` neurons in this order."""
    experts = len(order) // size
    down = ffn.down_proj.weight[:, order].T.unflatten(0, (experts, size))
    products = torch.empty(*x.shape[:2], experts, experts)
    for index, row in enumerate(x):
        h = hidden(ffn, row)[:, order].unflatten(1, (experts, size))
        outputs = torch.einsum("tes,esd->etd", h, down).transpose(0, 1)
        whole = outputs.sum(1).square().sum(-1)
        torch.matmul(outputs / whole[:, None, None].clamp_min(1e-12), outputs.mT, out=products[index])
    return Tokens(x, products)


def fitted_router(tokens: Tokens, always_on: int, context: int) -> Router:
    """A router as `lte.train.router_init.fit_routers_` leaves it, for relative norms of the experts' outputs."""
    router = Router(tokens.x.shape[-1], tokens.products.shape[-1], always_on=always_on, context=context)
    norms = tokens.products.diagonal(dim1=-2, dim2=-1).clamp_min(1e-8).log().flatten(0, 1).double() / 2
    x = F.pad(tokens.x, (0, 1), value=1.0).flatten(0, 1).double()
    xx = x.T @ x
    solution = torch.linalg.solve(xx + 1e-2 * xx.diagonal().mean() * torch.eye(len(xx)), x.T @ norms)
    mean, deviation = norms[:, always_on:].mean(), norms[:, always_on:].std()
    router.assign_((solution[:-1].T / deviation).float(), ((solution[-1] - mean) / deviation + INITIAL_LOGIT).float())
    return router


def logits_of(router: Router, x: Tensor) -> Tensor:
    """[N, T, E] of documents x [N, T, D]."""
    positions = torch.arange(x.shape[1]).expand(x.shape[:2])
    return router(x, partial(mean_before, positions=positions, window=router.context))


def errors(products: Tensor, off: Tensor) -> Tensor:
    """||y - y_sparse||^2 / ||y||^2 of each token [N, T], for how far each expert is off, [N, T, E]."""
    # Products are symmetric: their gradient needs no second look at them.
    with torch.no_grad():
        half = torch.matmul(products, off.unsqueeze(-1)).squeeze(-1)
    return (half * (2 * off - off.detach())).sum(-1)


def train(tokens: Tokens, setting: Setting, core: int, target: float, steps: int, rate: float) -> tuple[Router, float]:
    """A router with this target and so many experts that are always on, and the `eta` on which the controller settled.

    A step is one of 4 documents, as often as all steps need them.
    """
    torch.manual_seed(0)
    router, controller = fitted_router(tokens, core, setting.context), EtaController()
    optimiser = torch.optim.AdamW(router.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    eta, batch = controller.eta, 4
    picks = torch.cat([torch.randperm(len(tokens.x)) for _ in range(math.ceil(steps * batch / len(tokens.x)))])
    for step in range(steps):
        rows = picks[step * batch : (step + 1) * batch]
        logits = logits_of(router, tokens.x[rows])
        scores = torch.sigmoid(logits)
        gate = (logits > 0).float() + (scores - scores.detach())
        loss, price = errors(tokens.products[rows], 1 - gate).mean(), efficiency_loss(scores)
        if setting.terms:
            follows = (torch.arange(logits.shape[1]) > 0).expand(logits.shape[:2])
            found = added_terms([logits[None]], [None], follows, 0.0, setting.terms)
            found.pop("chunk_efficiency_by_layer", None)
            price = found.pop("chunk_efficiency", price)
            loss = loss + (weighted_sum(found, setting.terms) if found else 0.0)
        (loss + eta * price).backward()
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        wanted = target * min(1.0, (step + 1) / (RAMP * steps))
        eta = controller.update(wanted, 1 - active_fraction(logits.detach()).item())
    return router, controller.settled


@torch.no_grad()
def measure(tokens: Tokens, scores: Tensor, target: float) -> dict[str, Any]:
    """Error, sparsity and union sparsity where the highest of the scores [N, T, E] are on; T may be a few fewer."""
    threshold = scores.flatten().kthvalue(max(1, round(target * scores.numel()))).values
    on = scores > threshold
    error = errors(tokens.products[:, : on.shape[1]], (~on).float()).mean().item()
    unions = {str(n): off_in_a_row(on, n).mean().item() for n in UNIONS}
    return {"error": error, "sparsity": 1 - on.float().mean().item(), "unions": unions}


def with_hindsight(tokens: Tokens, target: float) -> Iterator[dict[str, Any]]:
    """The same by what experts contribute to each token, or on average to each chunk of 8, which no router knows.

    One threshold for all, so that some tokens have more experts than others. What experts add up to is not in it, so
    that lower errors are possible.
    """
    squares = tokens.products.diagonal(dim1=-2, dim2=-1)
    for chunk in (1, 8):
        whole = squares[:, : squares.shape[1] // chunk * chunk]
        means = whole.unflatten(1, (-1, chunk)).mean(2).repeat_interleave(chunk, 1)
        name = f"hindsight, chunks of {chunk}" if chunk > 1 else "hindsight"
        yield {"setting": name, **measure(tokens, means, target)}


def configs_of(args: argparse.Namespace, settings: list[Setting]) -> dict[tuple[str, float], LteConfig]:
    """How neurons are put into experts, for each grouping and share that is always on."""
    kinds = dict.fromkeys((each.grouping, each.always_on) for each in settings)
    return {
        (grouping, always_on): LteConfig(
            expert_size=args.expert_size, grouping=grouping, always_on=always_on, target_sparsity=max(args.targets)
        )
        for grouping, always_on in kinds
    }


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each layer, target and setting."""
    wanted = [each for each in SETTINGS if not args.settings or each.name in args.settings]
    configs = configs_of(args, wanted)
    model, tokenizer = load_dense_model(args.model), load_tokenizer(args.model)
    ffns = dense_ffns(model, family_of(model.config))
    layers = sorted(args.layers)
    if not 0 <= layers[0] <= layers[-1] < len(ffns):
        raise SystemExit(f"--layers must lie in [0, {len(ffns)}), got {args.layers}")
    names = [list(ffns)[layer] for layer in layers]
    if not hasattr(ffns[names[0]], "gate_proj"):
        raise SystemExit(f"model must have FFNs with gate_proj, up_proj and down_proj, got {type(model).__name__}")
    experts = ffns[names[0]].gate_proj.out_features // args.expert_size
    for config in configs.values():
        check_reachable(config, experts)
    ids = [
        documents(path, tokenizer, count, args.length)
        for path, count in ((args.train, args.documents), (args.held_out, max(1, args.documents // 4)))
    ]
    seen, held_out = (inputs_of(model, names, each) for each in ids)
    for name, layer in zip(names, layers, strict=True):
        for kind, config in configs.items():
            order = order_of(ffns[name], seen[name], config)
            tokens, others = (tokens_of(ffns[name], x[name], order, args.expert_size) for x in (seen, held_out))
            core = config.num_always_on(experts)
            for target in args.targets:
                common = {"layer": layer, "grouping": config.grouping, "always_on": core, "target": target}
                if not core:
                    yield from ({**common, **found} for found in with_hindsight(others, target))
                for setting in [each for each in wanted if (each.grouping, each.always_on) == kind]:
                    router, eta = train(tokens, setting, core, target, args.steps, args.rate)
                    with torch.no_grad():
                        found = measure(others, logits_of(router, others.x), target)
                    yield {**common, "setting": setting.name, "terms": asdict(setting.terms), "eta": eta, **found}
            # The next ones need as much memory.
            del tokens, others


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a dense model with gated FFNs: a folder, or a GGUF file")
    parser.add_argument("--train", type=Path, required=True, help="documents, JSON lines with text, packed or not")
    parser.add_argument("--held-out", type=Path, required=True, help="as --train, others")
    parser.add_argument("--documents", type=int, default=160, help="of --train; a quarter as many of --held-out")
    parser.add_argument("--length", type=int, default=256, help="tokens of a document")
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 11, 19])
    parser.add_argument("--targets", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--settings", nargs="+", choices=[each.name for each in SETTINGS], help="default: all")
    parser.add_argument("--expert-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=600, help="of 4 documents")
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate of the routers")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    """Trains all routers and writes one file, which holds those until now while it goes on."""
    args = parse()
    config = {key: value for key, value in vars(args).items() if key not in ("model", "output")}
    config |= {"train": args.train.name, "held_out": args.held_out.name}
    found = []
    for row in rows(args):
        found.append(row)
        unions = ", ".join(f"{n} tokens {share:.1%}" for n, share in row["unions"].items())
        print(
            f"layer {row['layer']}, {row['target']:.0%}, {row['grouping']}, {row['setting']}: "
            f"error {row['error']:.4f}, off for a token {row['sparsity']:.1%}, together for {unions}",
            flush=True,
        )
        record = {"experiment": "shared_routers", "model": Path(args.model).name, "config": config, "rows": found}
        write_json_atomic(args.output, {**record, **environment()})


if __name__ == "__main__":
    main()
