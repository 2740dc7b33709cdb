"""`lte report`: methods compared, from result files alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from lte.cli.command import reports_errors
from lte.config import check_choice
from lte.files import check_place

if TYPE_CHECKING:
    from lte.report.inputs import Inputs


@reports_errors
def report(
    results: Annotated[list[Path], typer.Argument(help="Result files, or folders that hold them.", metavar="RESULTS")],
    output: Annotated[Path | None, typer.Option(help="Also write report.md, report.csv and figures here.")] = None,
    metric: Annotated[str | None, typer.Option(help="Another metric of the records than their main one.")] = None,
    by: Annotated[
        list[str] | None,
        typer.Option(help="A curve for each value of this field, say config.lte.expert_size; can be repeated."),
    ] = None,
    drop: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="For the fewest GFLOPs: how far below dense is allowed, in the metric's unit.",
            show_default="0.5 perplexity, 0.05 ROUGE, 0.01 of a share",
        ),
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="This task alone; can be repeated.")] = None,
    higher: Annotated[list[str] | None, typer.Option(help="Declares a metric: higher is better.")] = None,
    lower: Annotated[list[str] | None, typer.Option(help="Declares a metric: lower is better.")] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="Also write one web page with everything; files of lte bench may be among RESULTS then."),
    ] = None,
) -> None:
    """Compares methods over result files: tables, trade-off curves, the paper's numbers beside ours. Loads no models.

    Example: `lte report results/compare/mrpc --output report`
    """
    if output is not None:
        check_place("output", output, folder=True)
    if html is not None:
        check_place("html", html)

    from lte.report.curves import curve_name, curve_name_by
    from lte.report.inputs import load_inputs
    from lte.report.methods_report import tradeoff_texts, write_methods_report
    from lte.report.points import find_tradeoffs
    from lte.report.report_page import write_html_report
    from lte.report.tables import TextTable

    inputs = load_inputs(results)
    if not inputs.records and not (html and inputs.benches):
        found = [f"{len(inputs.benches)} files of lte bench, which --html shows"] if inputs.benches else []
        found += [f"{len(inputs.skipped)} other JSON files"] if inputs.skipped else []
        places = ", ".join(map(str, results))
        raise ValueError(f"RESULTS must hold at least one result record, got {' and '.join(found)} in {places}")
    records = inputs.records
    for name in task or ():
        check_choice("task", name, sorted({record.task for record in records}))
    records = [record for record in records if not task or record.task in task]
    curve = curve_name_by(by, records) if by else curve_name
    declared = {"higher": higher or (), "lower": lower or ()}
    tradeoffs = find_tradeoffs(records, metric=metric, curve=curve, **declared) if records else []
    console = Console()
    for tradeoff in tradeoffs:
        for part in tradeoff_texts(tradeoff, drop):
            if isinstance(part, TextTable):
                console.print(part.rich(console.width))
            else:
                console.print(part, highlight=False, markup=False)
        console.print()
    files = write_methods_report(output, tradeoffs, drop) if output is not None else []
    if html is not None:
        files.append(write_html_report(html, tradeoffs, inputs.benches, drop))
    for note in _notes(inputs, html):
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    if files:
        console.print(f"Written: {', '.join(map(str, files))}", highlight=False, markup=False, soft_wrap=True)


def _notes(inputs: Inputs, html: Path | None) -> list[str]:
    """A line for each kind of files that nothing is shown of."""
    notes = []
    if inputs.benches and html is None:
        names = ", ".join(bench.source for bench in inputs.benches)
        notes.append(f"Not shown, {len(inputs.benches)} files of lte bench, which --html shows: {names}")
    if inputs.skipped:
        names = ", ".join(inputs.skipped)
        notes.append(f"Skipped, {len(inputs.skipped)} JSON files without a result record or rows of lte bench: {names}")
    return notes
