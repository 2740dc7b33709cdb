"""Which experts groups of tokens leave off together, counted from masks of active experts.

Shapes: N rows of T tokens, E experts, G groups of n tokens.
"""

from __future__ import annotations

from torch import Tensor


def chunk_unions(active: Tensor, tokens: int) -> Tensor:
    """The experts that at least one of n consecutive tokens switches on; chunks begin at the start of each row.

    Args:
        active: bool [N, T, E].
        tokens: n; what remains at the end of a row is left out.

    Returns:
        bool [N, T // n, E].
    """
    whole = active.shape[1] // tokens * tokens
    return active[:, :whole].unflatten(1, (whole // tokens, tokens)).any(2)


def off_in_a_row(active: Tensor, tokens: int) -> Tensor:
    """The share of chunks of n consecutive tokens that leave each expert off, fp64 [E], for masks [N, T, E]."""
    return (~chunk_unions(active, tokens)).double().mean((0, 1))


def off_of_texts(active: Tensor, tokens: int) -> Tensor:
    """The share of groups that leave each expert off, fp64 [E]: n neighbouring rows of masks [N, T, E], each place."""
    return (~chunk_unions(active.transpose(0, 1), tokens)).double().mean((0, 1))


def count_unions(active: Tensor, keep: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """How many experts chunks of n consecutive tokens switch on in all, and how many chunks there are.

    Args:
        active: bool [N, T, E].
        keep: bool [N, T], which tokens count; a chunk counts if all of its tokens do.
        tokens: n.

    Returns:
        Two whole numbers as tensors on the device of `active`.
    """
    whole = keep.shape[1] // tokens * tokens
    counted = keep[:, :whole].unflatten(1, (whole // tokens, tokens)).all(2)
    return (chunk_unions(active, tokens).sum(2) * counted).sum(), counted.sum()
