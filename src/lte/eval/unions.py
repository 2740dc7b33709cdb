"""What tokens leave off together: consecutive ones, random ones of the same text, and those of different texts.

A step that reads several tokens, a batch, the check of a draft or a prompt, reads the union of their experts. The union
sparsity of n tokens is the share of experts that none of them switches on. Tokens that choose independently of each
other leave (1 - f)^n of an expert off that is on for a share f of all tokens.

Shapes: L layers, N pieces of text of T tokens each, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lte.config import check_whole_number
from lte.eval.decisions import check_decoder
from lte.eval.inference import hard_inference, model_device
from lte.eval.token_routing import recorded_logits, routed_part
from lte.eval.union_oracle import CHUNK, measure_oracle
from lte.hf.inputs import check_tokens
from lte.hf.install import require_sparse_ffns
from lte.nn.unions import off_in_a_row, off_of_texts
from lte.records import environment

TOKENS = (2, 4, 8, 16, 32, 64)
LEVELS = (0.01, 0.05, 0.1)
"""An expert is nearly never on where at most such a share of the tokens switches it on, nearly always where all but
such a share do."""
ROWS_AT_A_TIME = 8


@dataclass(frozen=True)
class UnionSettings:
    """What is measured.

    Attributes:
        pieces: N.
        length: T, tokens of a piece.
        oracle_layers: of how many layers, spread over the depth, it is said what another grouping would reach.
        oracle_tokens: on how many tokens that is, half of which decide the grouping.
        seed: of random tokens and of the grouping.
    """

    pieces: int = 64
    length: int = 256
    oracle_layers: int = 4
    oracle_tokens: int = 8192
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("pieces", 2), ("length", 2), ("oracle_layers", 0), ("oracle_tokens", 1), ("seed", 0)):
            check_whole_number(name, getattr(self, name), least)


@dataclass(frozen=True)
class OffTogether:
    """How often each expert is off for all of n tokens, fp64 on the CPU.

    Attributes:
        use: share of the tokens that switch an expert on, [L, E].
        off: by n, and then by `consecutive` (tokens in a row), `random` (of the same piece) and `texts` (of different
            pieces at the same place): the share of groups of n that leave it off, [L, E].
        groups: how many groups there are, by the same keys.
    """

    use: Tensor
    off: dict[int, dict[str, Tensor]]
    groups: dict[int, dict[str, int]]


def count_off_together(masks: Sequence[Tensor], tokens: Sequence[int] = TOKENS, seed: int = 0) -> OffTogether:
    """Counts for masks of active experts.

    Args:
        masks: bool [N, T, E] of each layer, on any device.
        tokens: values of n; those for which there is no group are left out.
        seed: of the random tokens, and of which pieces come together.
    """
    rows, length = masks[0].shape[:2]
    generator = torch.Generator().manual_seed(seed)
    places, pieces = torch.rand(rows, length, generator=generator).argsort(1), torch.randperm(rows, generator=generator)
    off: dict[int, dict[str, Tensor]] = {}
    groups: dict[int, dict[str, int]] = {}
    kinds: dict[str, list[dict[int, Tensor]]] = {"consecutive": [], "random": [], "texts": []}
    for mask in masks:
        shuffled = mask.gather(1, places.to(mask.device)[..., None].expand_as(mask))
        mixed = mask[pieces.to(mask.device)]
        in_rows, in_texts = ([n for n in tokens if n <= most] for most in (length, rows))
        kinds["consecutive"].append({n: off_in_a_row(mask, n) for n in in_rows})
        kinds["random"].append({n: off_in_a_row(shuffled, n) for n in in_rows})
        kinds["texts"].append({n: off_of_texts(mixed, n) for n in in_texts})
    for n in tokens:
        found = {name: layers for name, layers in kinds.items() if n in layers[0]}
        if found:
            off[n] = {name: torch.stack([layer[n].cpu() for layer in layers]) for name, layers in found.items()}
            in_a_row, of_texts = rows * (length // n), rows // n * length
            groups[n] = {name: of_texts if name == "texts" else in_a_row for name in found}
    use = torch.stack([mask.double().mean((0, 1)).cpu() for mask in masks])
    return OffTogether(use, off, groups)


def union_rows(counted: OffTogether) -> list[dict[str, Any]]:
    """The union sparsity of n tokens, beside that of independent tokens.

    Returns:
        A row for each n, JSON-ready: `tokens`, n, and by name `sparsity`, `by_layer`, and `groups` of what was counted:
        `consecutive`, `random` and `texts` as in `OffTogether`; `frequencies`, tokens that choose independently, each
        expert as often as it is on; `uniform`, the same with all experts of a layer alike.
    """
    rows = []
    for n, kinds in counted.off.items():
        row: dict[str, Any] = {"tokens": n}
        for name, off in kinds.items():
            row[name] = {**_share(off), "groups": counted.groups[n][name]}
        row["frequencies"] = _share((1 - counted.use) ** n)
        row["uniform"] = _share((1 - counted.use.mean(1, keepdim=True)) ** n)
        rows.append(row)
    return rows


def _share(off: Tensor) -> dict[str, Any]:
    return {"sparsity": off.mean().item(), "by_layer": off.mean(1).tolist()}


def extremes(counted: OffTogether, level: float) -> dict[str, Any]:
    """How much of the union sparsity is due to experts that are nearly always or nearly never on.

    Args:
        counted: from `count_off_together`.
        level: see `LEVELS`.

    Returns:
        JSON-ready: `nearly_never` and `nearly_always`, the shares of such experts among all, and by layer; `rows`, for
        each n the union sparsity of consecutive tokens as a sum: `of_nearly_never` + `of_nearly_always` + `of_others`;
        and that of the others alone, `others`, beside `others_frequencies`, what their frequencies give (`None` where
        there are none).
    """
    never, always = counted.use <= level, counted.use >= 1 - level
    others = ~(never | always)
    some = bool(others.any())
    rows = []
    for n, kinds in counted.off.items():
        if "consecutive" not in kinds:
            continue
        off, independent = kinds["consecutive"], (1 - counted.use) ** n
        parts = {"nearly_never": never, "nearly_always": always, "others": others}
        rows.append(
            {
                "tokens": n,
                **{f"of_{name}": (off * part).mean().item() for name, part in parts.items()},
                "others": off[others].mean().item() if some else None,
                "others_frequencies": independent[others].mean().item() if some else None,
            }
        )
    shares = {"nearly_never": never, "nearly_always": always}
    return {
        "level": level,
        **{name: part.double().mean().item() for name, part in shares.items()},
        **{f"{name}_by_layer": part.double().mean(1).tolist() for name, part in shares.items()},
        "rows": rows,
    }


def routed_masks(model: Any, ids: Tensor) -> list[Tensor]:
    """The active experts of each layer, bool [N, T, E] on the layer's device, for pieces of text read alone.

    Args:
        model: an LTE decoder.
        ids: [N, T].
    """
    ffns, part = list(require_sparse_ffns(model).values()), routed_part(model)
    found: list[list[Tensor]] = [[] for _ in ffns]
    with recorded_logits(ffns), hard_inference(model):
        for rows in ids.split(ROWS_AT_A_TIME):
            part(input_ids=rows.to(model_device(part)), use_cache=False)
            for layer, ffn in zip(found, ffns, strict=True):
                assert ffn.logits is not None
                # Some blocks flatten [B, T] before their FFN.
                layer.append((ffn.logits > ffn.threshold_logit).reshape(*rows.shape, -1))
    return [torch.cat(layer) for layer in found]


def measure_unions(
    model: Any, ids: Tensor, settings: UnionSettings, say: Callable[[str], Any] = lambda text: None
) -> dict[str, Any]:
    """Everything that `lte unions` says of a model.

    Args:
        model: an LTE decoder in plain PyTorch.
        ids: pieces of text, at most N rows [N, T].
        settings: the same N and T, and what else counts.
        say: is told what is measured next.

    Returns:
        JSON-ready: the environment and the settings; `sparsity`, share of experts that a token leaves off, and
        `layer_sparsity`; `rows`, see `union_rows`; `extremes`, see there, for each of `LEVELS`; `oracle`, see
        `lte.eval.union_oracle.measure_oracle`, or `None`.

    Raises:
        ValueError: for a dense model or one with an encoder, or tokens that it does not take.
    """
    check_decoder(model)
    check_tokens(model, ids)
    say("which experts each token switches on")
    counted = count_off_together(routed_masks(model, ids), seed=settings.seed)
    oracle: Mapping[str, Any] | None = None
    rows = settings.oracle_tokens // ids.shape[1]
    if settings.oracle_layers and min(rows, len(ids)) >= 2 and ids.shape[1] >= CHUNK:
        oracle = measure_oracle(model, ids[:rows], settings.oracle_layers, settings.seed, say)
    elif settings.oracle_layers:
        say(
            f"nothing of other experts, which takes two pieces of at least {CHUNK} tokens, within oracle_tokens="
            f"{settings.oracle_tokens}"
        )
    return {
        **environment(),
        **asdict(settings),
        "pieces": len(ids),
        "length": ids.shape[1],
        "experts": counted.use.shape[1],
        "sparsity": 1 - counted.use.mean().item(),
        "layer_sparsity": (1 - counted.use.mean(1)).tolist(),
        "rows": union_rows(counted),
        "extremes": [extremes(counted, level) for level in LEVELS],
        "oracle": oracle,
    }
