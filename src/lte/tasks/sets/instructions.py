"""Instruction tuning: LIMA, Alpaca, and Tulu."""

from __future__ import annotations

from lte.tasks.task import ChatTask, HubData

_COLUMNS = {"messages": ("messages", "conversations"), "instruction": ("instruction",), "output": ("output",)}


def _chat(name: str, hub: HubData, *files: str) -> ChatTask:
    return ChatTask(
        name=name,
        metrics=("perplexity",),
        files={"train": files},
        folders=(name, "instruct"),
        hub=hub,
        columns=_COLUMNS,
    )


TASKS = (
    _chat("lima", HubData("GAIR/lima"), "lima.jsonl", "lima.json"),
    _chat("alpaca", HubData("tatsu-lab/alpaca"), "alpaca_data.json", "alpaca.jsonl", "alpaca_subset.jsonl"),
    _chat("tulu", HubData("allenai/tulu-v2-sft-mixture"), "tulu.jsonl", "tulu_v2_data.jsonl"),
)
