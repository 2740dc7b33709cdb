"""One group of a benchmark over all sparsities: its rows, and how the routers of a whole model are set for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lte.bench.acceleration import expect_
from lte.bench.dense import Projections
from lte.bench.gate import check_ffns, layer_inputs
from lte.bench.routing import RouterValues, Use, force_random_, force_same_
from lte.bench.rows import Row, is_dense, with_ratios
from lte.bench.session import Session, describe
from lte.bench.settings import OWN
from lte.nn.sparse_ffn import SparseFfn

DENSE_USE = Use(active=1.0, union=1.0)


class Sweep:
    """Collects times of the same providers at one sparsity after the other.

    Every sparsity is timed beside the dense providers again, and compared with the fastest of them there. In the
    results each dense provider has one row, of all its times.

    Args:
        session: the run.
        key: of the group in the results.
        row: makes a row of a provider's name, times, the sparsity asked for and the experts in use.
    """

    def __init__(self, session: Session, key: Any, row: Callable[[str, list[float], float | str | None, Use], Row]):
        self.session, self.key, self.row = session, key, row
        self.dense: dict[str, list[float]] = {}
        self.rows: list[Row] = []

    def add(self, samples: Mapping[str, list[float]], sparsity: float | str, use: Use) -> None:
        """Adds the times at one sparsity, reports them, and writes the results."""
        rows = with_ratios(
            [
                self.row(name, found, None, DENSE_USE) if is_dense_name(name) else self.row(name, found, sparsity, use)
                for name, found in samples.items()
            ]
        )
        for row in rows:
            if not (is_dense(row) and row["provider"] in self.dense):
                self.session.say(describe(row))
            if is_dense(row):
                self.dense.setdefault(row["provider"], []).extend(samples[row["provider"]])
            else:
                self.rows.append(row)
        pooled = [self.row(name, found, None, DENSE_USE) for name, found in self.dense.items()]
        self.session.results.put(self.key, [*with_ratios(pooled), *self.rows])


def is_dense_name(provider: str) -> bool:
    """Whether a provider is a dense baseline."""
    return is_dense({"provider": provider})


def check_forced(
    session: Session,
    ffns: Sequence[SparseFfn],
    own: RouterValues,
    sparsity: float | str,
    tokens: int,
    run: Callable[[], object],
) -> float:
    """Compares the layers with the reference on the hidden states of `run`, on the path of a sparsity.

    The same experts are forced for all tokens: where hidden states are rounded otherwise, no expert changes.

    Raises:
        RuntimeError: if a layer is wrong.
    """
    if sparsity == OWN:
        own.restore_()
    else:
        expect_(ffns, 1 - float(sparsity), tokens)
    force_same_(ffns, 0.5 if sparsity == OWN else float(sparsity), session.settings.seed)
    stock = [Projections.of(ffn, session.pair.family.layout) for ffn in session.pair.dense_ffns]
    return check_ffns(ffns, layer_inputs(ffns, run), stock, session.activation, not session.int8)


def use_fields(sparsity: float | str | None, use: Use, routing: str) -> dict[str, Any]:
    """What a row says of its routing; `sparsity` is `None` for a dense provider."""
    dense = sparsity is None
    return {
        "sparsity": 1 - use.active,
        "union_sparsity": 1 - use.union,
        "setting": None if dense else str(sparsity),
        "routing": None if dense else OWN if sparsity == OWN else routing,
    }


def model_routing(session: Session, ffns: Sequence[SparseFfn], tokens: int) -> str:
    """How forced routers of a whole model decide: "same" for all tokens, or "random" for each."""
    low_rank = ffns[0].router.down is not None
    return "same" if session.settings.routing == "same" or tokens == 1 or low_rank else "random"


def route_model_(
    session: Session,
    ffns: Sequence[SparseFfn],
    own: RouterValues,
    sparsity: float | str,
    tokens: int,
    text: Callable[[], object],
    steps: Callable[[], object] | None = None,
) -> None:
    """Sets the routers of a whole model for passes of T tokens; `text` and `steps` are those of `force_random_`."""
    if sparsity == OWN:
        own.restore_()
        return
    expect_(ffns, 1 - float(sparsity), tokens)
    if model_routing(session, ffns, tokens) == "same":
        force_same_(ffns, float(sparsity), session.settings.seed)
    else:
        force_random_(ffns, float(sparsity), text, steps, session.settings.seed)
