"""`lte configs`: accelerate's configs for training in shards, listed and copied."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from lte.cli.command import reports_errors
from lte.config import check_choice
from lte.files import check_place
from lte.launch import FOLDER, shipped_configs


@reports_errors
def configs(
    name: Annotated[str | None, typer.Argument(help="One of those that are listed; without, they are.")] = None,
    output: Annotated[Path | None, typer.Option(help="File or folder to copy it to; without, it is printed.")] = None,
) -> None:
    """Lists the configs of accelerate that come with lte, for FSDP2 and DeepSpeed, prints one, or copies it.

    Example: `lte configs fsdp2 --output .`, then `accelerate launch --config_file fsdp2.yaml --num_processes 8 -m lte
    train ...`
    """
    shipped = shipped_configs()
    if name is None:
        if output is not None:
            raise ValueError(f"name must be given with output, got none; take one of {', '.join(shipped)}")
        for each, purpose in shipped.items():
            typer.echo(f"{each}: {purpose}")
        return
    check_choice("name", name, tuple(shipped))
    source = FOLDER / f"{name}.yaml"
    if output is None:
        typer.echo(source.read_text(encoding="utf-8"), nl=False)
        return
    target = output.expanduser()
    target = target / source.name if target.is_dir() else target
    check_place("output", target)
    if target.exists():
        raise ValueError(f"output must be a new file, got output={target}, which exists; name another one")
    shutil.copyfile(source, target)
    processes = 1 if name == "fsdp2_offload" else 8
    following = f"accelerate launch --config_file {target} --num_processes {processes} -m lte train ..."
    typer.echo(f"Written to {target}. Next: {following}")
