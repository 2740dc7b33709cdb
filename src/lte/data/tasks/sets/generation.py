"""Tasks whose answer is a text: E2E (data to text), XSum, DialogSum and SciTLDR (summaries)."""

from __future__ import annotations

from lte.data.tasks.task import GenerationTask, HubData

_ROUGE = ("rougeL", "rouge1", "rouge2")
_SUMMARY = "{source}\nSummary:\n"


def _jsonl(*stems: str) -> dict[str, tuple[str, ...]]:
    splits = ("train", "validation", "test")
    return {split: (f"{stem}.jsonl", f"{stem}.json") for split, stem in zip(splits, stems, strict=True)}


TASKS = (
    GenerationTask(
        name="e2e",
        metrics=("rougeL", "bleu", "nist"),
        files={"train": ("trainset.csv",), "validation": ("devset.csv",), "test": ("testset_w_refs.csv",)},
        folders=("e2e", "e2e-dataset"),
        hub=HubData("tuetschek/e2e_nlg", converted="default"),
        columns={
            "source": ("mr", "MR", "meaning_representation"),
            "reference": ("ref", "human_reference"),
        },
        template="{source}\nDescription:\n",
        max_new_tokens=100,
    ),
    GenerationTask(
        name="xsum",
        metrics=_ROUGE,
        files=_jsonl("train", "validation", "test"),
        folders=("xsum",),
        hub=HubData("EdinburghNLP/xsum", converted="default"),
        columns={"source": ("document",), "reference": ("summary",)},
        template=_SUMMARY,
        max_new_tokens=64,
    ),
    GenerationTask(
        name="dialogsum",
        metrics=_ROUGE,
        files=_jsonl("dialogsum.train", "dialogsum.dev", "dialogsum.test"),
        folders=("dialogsum", "DialogSum_Data"),
        hub=HubData("knkarthick/dialogsum"),
        columns={
            "source": ("dialogue",),
            "reference": ("summary", "summary1"),
            "reference2": ("summary2",),
            "reference3": ("summary3",),
        },
        template=_SUMMARY,
        max_new_tokens=128,
    ),
    GenerationTask(
        name="scitldr",
        metrics=_ROUGE,
        files=_jsonl("train", "dev", "test"),
        folders=("scitldr", "SciTLDR-A", "SciTLDR-Data/SciTLDR-A"),
        hub=HubData("allenai/scitldr", converted="Abstract"),
        columns={"source": ("source",), "reference": ("target",)},
        template=_SUMMARY,
        max_new_tokens=64,
    ),
)
