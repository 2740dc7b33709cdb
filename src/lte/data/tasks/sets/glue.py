"""GLUE's eight classification tasks, and SNLI. Files are those that GLUE's download gives."""

from __future__ import annotations

from lte.data.tasks.task import ClassificationTask, HubData

_FILES = {"train": ("train.tsv",), "validation": ("dev.tsv",), "test": ("test.tsv",)}
_INFERENCE = ("entailment", "not_entailment")
_THREE_WAY = ("entailment", "neutral", "contradiction")


def _glue(
    folder: str,
    labels: tuple[str, ...],
    metrics: tuple[str, ...],
    text: tuple[str, ...],
    text_pair: tuple[str, ...] = (),
    label: tuple[str, ...] = ("label",),
) -> ClassificationTask:
    name = folder.lower().replace("-", "")
    columns = {"text": text, "label": label}
    return ClassificationTask(
        name=name,
        metrics=metrics,
        files=_FILES,
        folders=(folder, f"glue/{folder}", name),
        hub=HubData("nyu-mll/glue", name),
        columns={**columns, "text_pair": text_pair} if text_pair else columns,
        # CoLA's training and dev files begin with their first row.
        headerless=dict.fromkeys(("train", "validation"), ("source", "label", "mark", "sentence"))
        if name == "cola"
        else {},
        labels=labels,
        measured_split="validation",
    )


_MNLI_SPLITS = {"validation": "validation_matched", "test": "test_matched"}
_MNLI = ClassificationTask(
    name="mnli",
    metrics=("accuracy",),
    files={
        "train": ("train.tsv",),
        "validation": ("dev_matched.tsv",),
        "validation_mismatched": ("dev_mismatched.tsv",),
        "test": ("test_matched.tsv",),
        "test_mismatched": ("test_mismatched.tsv",),
    },
    folders=("MNLI", "glue/MNLI", "mnli"),
    hub=HubData("nyu-mll/glue", "mnli", splits=_MNLI_SPLITS),
    columns={
        "text": ("sentence1", "premise"),
        "text_pair": ("sentence2", "hypothesis"),
        "label": ("gold_label", "label"),
    },
    labels=_THREE_WAY,
    measured_split="validation",
    further_splits={"mismatched": "validation_mismatched"},
)

_SNLI = ClassificationTask(
    name="snli",
    metrics=("accuracy",),
    files={
        "train": ("train.tsv", "snli_1.0_train.jsonl"),
        "validation": ("validation.tsv", "dev.tsv", "snli_1.0_dev.jsonl"),
        "test": ("test.tsv", "snli_1.0_test.jsonl"),
    },
    folders=("snli", "SNLI", "snli_1.0"),
    hub=HubData("stanfordnlp/snli"),
    columns={
        "text": ("premise", "sentence1"),
        "text_pair": ("hypothesis", "sentence2"),
        "label": ("gold_label", "label"),
    },
    labels=_THREE_WAY,
)

TASKS = (
    _glue("SST-2", ("negative", "positive"), ("accuracy",), ("sentence",)),
    _glue(
        "MRPC",
        ("not_equivalent", "equivalent"),
        ("accuracy", "f1"),
        ("#1 String", "sentence1"),
        ("#2 String", "sentence2"),
        ("Quality", "label"),
    ),
    _glue("RTE", _INFERENCE, ("accuracy",), ("sentence1",), ("sentence2",)),
    _glue("CoLA", ("unacceptable", "acceptable"), ("matthews",), ("sentence",)),
    _glue("STS-B", (), ("pearson", "spearman"), ("sentence1",), ("sentence2",), ("score", "label")),
    _glue("QNLI", _INFERENCE, ("accuracy",), ("question",), ("sentence",)),
    _MNLI,
    _glue(
        "QQP",
        ("not_duplicate", "duplicate"),
        ("accuracy", "f1"),
        ("question1",),
        ("question2",),
        ("is_duplicate", "label"),
    ),
    _SNLI,
)
