"""Instruction tuning: LIMA, Alpaca, Tulu, and LIMA with Alpaca."""

from __future__ import annotations

from dataclasses import replace

from lte.data.tasks.task import ChatTask, HubData

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


def _mixture(name: str, *parts: ChatTask) -> ChatTask:
    """All chats of several tasks as one, in which they are shuffled and held out alike."""
    files = tuple(file for part in parts for file in part.files["train"])
    hub = HubData(", ".join(part.hub.path for part in parts))
    return replace(_chat(name, hub, *files), parts=parts)


_LIMA = _chat("lima", HubData("GAIR/lima"), "lima.jsonl", "lima.json")
_ALPACA = _chat("alpaca", HubData("tatsu-lab/alpaca"), "alpaca_data.json", "alpaca.jsonl", "alpaca_subset.jsonl")

TASKS = (
    _LIMA,
    _ALPACA,
    _chat("tulu", HubData("allenai/tulu-v2-sft-mixture"), "tulu.jsonl", "tulu_v2_data.jsonl"),
    _mixture("instruct", _LIMA, _ALPACA),
)
