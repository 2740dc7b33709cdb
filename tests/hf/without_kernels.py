"""What runs where neither Triton nor numba is installed; a program, since other tests have imported both."""

from __future__ import annotations

import sys

for missing in ("triton", "numba", "llvmlite"):
    sys.modules[missing] = None  # type: ignore[assignment]


def main() -> None:
    """Raises what goes wrong."""
    import torch

    import lte
    import lte_cli
    from lte.hf.acceleration import describe_kernels
    from tests.tiny_models import tiny_sparse_model

    model, tokens = tiny_sparse_model(), torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        expected = model(tokens).logits
        lte.accelerate_(model)
        torch.testing.assert_close(model(tokens).logits, expected)
    assert describe_kernels(model) == {"weights": "native", "decode": "pytorch", "prefill": "pytorch"}
    assert lte_cli.load_command("train")
    assert not any(name.startswith("lte.ops.decode") for name in sys.modules)
    print("all is well")


if __name__ == "__main__":
    main()
