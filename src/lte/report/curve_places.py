"""Which place in the list of looks a curve has, in figures and on pages alike."""

from __future__ import annotations

from collections.abc import Iterable

# These have the same place everywhere; other curves get what is left.
_METHODS: tuple[str, ...] = ("lte", "static_pruning", "cats", "teal", "wina", "wanda", "kla")
_METHODS += ("moefication", "deja_vu", "sigma_moe", "noisy_topk", "random_router")


def curve_places(names: Iterable[str]) -> dict[str, int]:
    """A place for each curve: its own for a known method, the next free one for others.

    Args:
        names: of all curves of all figures that shall agree.
    """
    names = sorted(set(names))
    places = {name: _METHODS.index(name) for name in names if name in _METHODS}
    free = (place for place in range(len(names) + len(_METHODS)) if place not in places.values())
    return {name: places[name] if name in places else next(free) for name in names}
