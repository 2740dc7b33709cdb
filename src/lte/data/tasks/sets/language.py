"""Language modelling: WikiText, and any text in a folder."""

from __future__ import annotations

from lte.data.tasks.task import HubData, LanguageTask


def _wikitext(size: str) -> LanguageTask:
    stems = {"train": "wiki.train", "validation": "wiki.valid", "test": "wiki.test"}
    return LanguageTask(
        name=f"wikitext{size}",
        metrics=("perplexity",),
        # Sub-word models read the original words; .tokens has <unk> for the rare ones.
        files={split: (f"{stem}.raw", f"{stem}.tokens") for split, stem in stems.items()},
        folders=(f"wikitext{size}", f"wikitext-{size}-raw", f"wikitext-{size}"),
        hub=HubData("Salesforce/wikitext", f"wikitext-{size}-raw-v1"),
        lines=True,
    )


def _names(*stems: str) -> tuple[str, ...]:
    return tuple(f"{stem}.{ending}" for stem in stems for ending in ("txt", "jsonl", "json"))


TASKS = (
    _wikitext("2"),
    _wikitext("103"),
    LanguageTask(
        name="text",
        metrics=("perplexity",),
        files={
            "train": _names("train"),
            "validation": _names("validation", "valid", "dev"),
            "test": _names("test"),
        },
        folders=(),
        hub=HubData(""),
    ),
)
