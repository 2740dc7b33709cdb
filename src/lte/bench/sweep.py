"""One group of a benchmark over all sparsities: its rows, and for a whole model how it is routed, checked and timed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from lte.bench.acceleration import expect_, path_names
from lte.bench.bytes import ffn_bytes, other_bytes, router_bytes
from lte.bench.dense import Projections
from lte.bench.gate import check_ffns, layer_inputs
from lte.bench.routing import RouterValues, Use, force_random_, force_same_, measure_use, move_thresholds_
from lte.bench.rows import Row, is_dense, with_ratios
from lte.bench.session import Session, describe
from lte.bench.settings import OWN, is_own, share_of
from lte.bench.timing import Call, interleaved_times

DENSE_USE = Use(active=1.0, union=1.0)


class Group:
    """The layers and functions of one number of tokens, timed at one sparsity after the other.

    Every sparsity is timed beside the dense providers again, and compared with the fastest of them there. In the
    results each dense provider has one row, of all its times.

    Args:
        session: the run.
        benchmark: "ffn", "decode" or "prefill".
        batch: B.
        tokens: T of a pass, all sequences together.
        layers: how many of the FFNs take part; `None` for all.
    """

    def __init__(self, session: Session, benchmark: str, batch: int, tokens: int, layers: int | None = None):
        self.session, self.benchmark, self.batch, self.tokens = session, benchmark, batch, tokens
        pair = session.pair
        self.ffns, self.dense_ffns = pair.sparse_ffns[:layers], pair.dense_ffns[:layers]
        self.stock = [Projections.of(ffn, pair.family.layout) for ffn in self.dense_ffns]
        self.own = RouterValues(pair.sparse_ffns)
        self.runs: dict[str, Call] = {}
        self.error = 0.0
        self._dense: dict[str, list[float]] = {}
        self._rows: list[Row] = []

    def row(self, name: str, samples: list[float], sparsity: float | str | None, use: Use, **extra: Any) -> Row:
        """A row of a provider's name, times, the sparsity asked for, `None` if dense, and the experts in use."""
        raise NotImplementedError

    def add(self, samples: Mapping[str, list[float]], sparsity: float | str, use: Use) -> None:
        """Adds the times at one sparsity, reports them, and writes the results."""
        rows = with_ratios(
            [
                self.row(name, found, None, DENSE_USE) if is_dense_name(name) else self.row(name, found, sparsity, use)
                for name, found in samples.items()
            ]
        )
        for row in rows:
            if not (is_dense(row) and row["provider"] in self._dense):
                self.session.say(describe(row))
            if is_dense(row):
                self._dense.setdefault(row["provider"], []).extend(samples[row["provider"]])
            else:
                self._rows.append(row)
        pooled = [self.row(name, found, None, DENSE_USE) for name, found in self._dense.items()]
        self.session.results.put((self.benchmark, self.batch, self.tokens), [*with_ratios(pooled), *self._rows])

    def expect(self, sparsity: float | str) -> None:
        """Lets the layers expect a forced sparsity, or gives them their own routers, with the thresholds asked for."""
        if not is_own(sparsity):
            expect_(self.ffns, 1 - float(sparsity), self.tokens)
            return
        self.own.restore_()
        if sparsity != OWN:
            pair, texts = self.session.pair, self.session.texts(self.batch)
            run = functools.partial(pair.sparse, input_ids=texts, use_cache=False, logits_to_keep=1)
            move_thresholds_(pair.sparse_ffns, share_of(sparsity), run)


def is_dense_name(provider: str) -> bool:
    """Whether a provider is a dense baseline."""
    return is_dense({"provider": provider})


def use_fields(sparsity: float | str | None, use: Use, routing: str) -> dict[str, Any]:
    """What a row says of its routing; `sparsity` is `None` for a dense provider."""
    dense = sparsity is None
    return {
        "sparsity": 1 - use.active,
        "union_sparsity": 1 - use.union,
        "setting": None if dense else str(sparsity),
        "routing": None if sparsity is None else OWN if is_own(sparsity) else routing,
    }


class ModelGroup(Group):
    """A whole model and its dense one; `context` tokens are in the key-value cache, 0 without one.

    Attributes:
        check_pass: a pass on whose hidden states the sparse layers are checked.
        text_pass: a pass of many tokens at once, on which the biases of random routers are set.
        steps: those passes whose experts count, if they are not those of `text_pass`.
    """

    check_pass: Callable[[], object]
    text_pass: Callable[[], object]
    steps: Callable[[], object] | None = None

    def __init__(self, session: Session, benchmark: str, batch: int, tokens: int, context: int = 0):
        super().__init__(session, benchmark, batch, tokens)
        self.rest = other_bytes(session.pair, batch, context)

    def prepare(self) -> None:
        """Fills `runs` with the providers; compiles those that are compiled."""
        raise NotImplementedError

    def before(self, provider: str) -> None:
        """Called before each timed call."""

    def measure(self) -> None:
        """Times all providers at all sparsities and puts the rows into the results.

        Raises:
            RuntimeError: if the sparse path is wrong; nothing is then timed.
        """
        session = self.session
        with self.own.kept():
            for index, sparsity in enumerate(session.settings.sparsities):
                self._check(sparsity)
                if index == 0:
                    self.prepare()
                self._route(sparsity)
                use = measure_use(self.ffns, self.steps or self.text_pass)
                samples = interleaved_times(self.runs, session.device, session.settings.repeats, self.before)
                self.add(samples, sparsity, use)

    def _check(self, sparsity: float | str) -> None:
        """Compares the layers with the reference on the hidden states of `check_pass`, on the path of a sparsity.

        The same experts are forced for all tokens: where hidden states are rounded otherwise, no expert changes.
        """
        session = self.session
        self.expect(sparsity)
        force_same_(self.ffns, 0.5 if is_own(sparsity) else float(sparsity), session.settings.seed)
        inputs = layer_inputs(self.ffns, self.check_pass)
        self.error = check_ffns(self.ffns, inputs, self.stock, session.activation, not session.int8)

    def _route(self, sparsity: float | str) -> None:
        self.expect(sparsity)
        seed = self.session.settings.seed
        if is_own(sparsity):
            return
        if self._routing() == "same":
            force_same_(self.ffns, float(sparsity), seed)
        else:
            force_random_(self.ffns, float(sparsity), self.text_pass, self.steps, seed)

    def _routing(self) -> str:
        """How forced routers decide: "same" for all tokens, or "random" for each."""
        low_rank = self.ffns[0].router.down is not None
        return "same" if self.session.settings.routing == "same" or self.tokens == 1 or low_rank else "random"

    def row(self, name: str, samples: list[float], sparsity: float | str | None, use: Use, **extra: Any) -> Row:
        """A provider's row."""
        session, dense = self.session, sparsity is None
        ffn = ffn_bytes(self.stock[0], self.tokens, use.union, not dense and session.int8)
        router = 0 if dense else router_bytes(self.ffns[0])
        return session.row(
            samples,
            self.rest + len(self.ffns) * (ffn + router),
            benchmark=self.benchmark,
            provider=name,
            scope="model",
            layers=len(self.ffns),
            batch=self.batch,
            tokens=self.tokens,
            **use_fields(sparsity, use, self._routing()),
            relative_rms=None if dense else self.error,
            path=None if dense else path_names(self.ffns, self.tokens),
            **extra,
        )
