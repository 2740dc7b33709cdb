"""The tasks that read local files: their prompts are lm-eval's own, and each row keeps its meaning."""

from __future__ import annotations

import gzip
import inspect
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

import lm_eval.tasks
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import env

from lte.eval import harness_files
from lte.eval.harness import TASK_FILES, evaluate_harness
from tests.eval.harness_toys import toy_model, toy_tokenizer

LM_EVAL = Path(lm_eval.tasks.__file__).parent
ORIGINALS = {
    "boolq_files": "super_glue/boolq/default.yaml",
    "gsm8k_files": "gsm8k/gsm8k.yaml",
    "openbookqa_files": "openbookqa/openbookqa.yaml",
    "piqa_files": "piqa/piqa.yaml",
    "social_iqa_files": "siqa/siqa.yaml",
    "truthfulqa_mc1_files": "truthfulqa/truthfulqa_mc1.yaml",
    "truthfulqa_mc2_files": "truthfulqa/truthfulqa_mc2.yaml",
    "winogrande_files": "winogrande/default.yaml",
}
# What makes prompts and scores. Where documents come from is ours.
KEPT = ("output_type", "description", "doc_to_text", "doc_to_target", "doc_to_choice", "process_results", "repeats")
KEPT += ("target_delimiter", "fewshot_delimiter", "generation_kwargs", "filter_list", "num_fewshot", "fewshot_config")
SUBJECTS = ("anatomy", "us_foreign_policy")


def comparable(value: Any) -> Any:
    """Functions are the same if their code is; each file's loader makes them anew."""
    return inspect.getsource(value) if callable(value) else value


def metrics(config: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"aggregation": "mean", "higher_is_better": True, **metric} for metric in config["metric_list"]]


def check_config(ours: dict[str, Any], original: dict[str, Any], but: tuple[str, ...] = ()) -> None:
    for key in KEPT:
        if key not in but:
            assert comparable(ours.get(key)) == comparable(original.get(key)), key
    assert metrics(ours) == metrics(original)
    assert ours["metadata"]["version"] == original["metadata"]["version"]


@pytest.mark.parametrize("name", ORIGINALS)
def test_prompts_and_metrics_are_lm_evals(name: str) -> None:
    ours = load_yaml(TASK_FILES / f"{name}.yaml")
    assert ours["task"] == name
    but = ()
    if name == "social_iqa_files":
        # The file joins context and question.
        but = ("doc_to_text",)
        assert ours["doc_to_text"] == "Q: {{context_question}}\nA:"
    check_config(ours, load_yaml(LM_EVAL / ORIGINALS[name]), but)


def test_mmlu_is_lm_evals() -> None:
    ours, group = load_yaml(TASK_FILES / "mmlu_files.yaml"), load_yaml(LM_EVAL / "mmlu/default/_mmlu.yaml")
    assert ours["aggregate_metric_list"] == [{"metric": "acc", "weight_by_size": True}]
    assert group["aggregate_metric_list"] == ours["aggregate_metric_list"]
    originals = [load_yaml(path) for path in (LM_EVAL / "mmlu/default").glob("mmlu_*.yaml")]
    found = {
        task["dataset_kwargs"]["subject"]: f"mmlu_{part['group']}_tasks"
        for part in ours["task"]
        for task in part["task"]
    }
    assert found == {original["dataset_name"]: original["tag"] for original in originals}
    original = originals[0]
    check_config({**ours, "metadata": original["metadata"]}, original, ("description",))
    assert ours["metadata"] == group["metadata"]
    for original in originals:
        description = ours["description"].replace(
            "{{subject.replace('_', ' ')}}", original["dataset_name"].replace("_", " ")
        )
        assert description == original["description"]


def write_gzip(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()))


def instruction(question: str, options: str, answer: str, ask: str = "answer to the question") -> str:
    text = f"Please choose the correct {ask}: {question}\n\n{options}Answer format: a/b"
    return json.dumps({"instruction": text, "input": "", "output": "", "answer": answer}) + "\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two rows of each set in the form of its file, with what could be cut wrongly: quotes, line breaks, spaces."""
    qa = tmp_path / "qa"
    for split in ("test", "dev"):
        rows = [f'{subject},"One, ""two"", {i}?",0,NA,x,y,{"CA"[i]}\n' for subject in SUBJECTS for i in range(2)]
        write_gzip(tmp_path / f"mmlu/{split}.csv.gz", "subject,question,A,B,C,D,answer\n" + "".join(rows))
    solutions = "Solution1: cut it \n\nSolution2: Answer1: break\n\n"
    write_gzip(
        qa / "piqa.test.jsonl.gz",
        instruction("open\na box", solutions, "solution2", "solution to the question")
        + instruction("shut it", "Solution1: a\n\nSolution2: b\n\n", "solution1", "solution to the question"),
    )
    four = "Answer1: a b Answer2: c Answer3: d Answer4: e\n\n"
    for split in ("test", "train"):
        rows = instruction("The sun is", four, "answer4") + instruction("Fog: where?", four, "answer1")
        write_gzip(qa / f"openbookqa.{split}.jsonl.gz", rows)
    three = "Answer1: a Answer2: b Answer3: c\n\n"
    rows = instruction("Tracy left. Why?", three, "answer3") + instruction("Lee sat. Then?", three, "answer1")
    write_gzip(qa / "social_i_qa.test.jsonl.gz", rows)
    blank = "answer to fill in the blank to complete the given sentence"
    rows = instruction("So _ won.", "Option1: Ann Option2: Bo ", "option2", blank)
    write_gzip(
        qa / "winogrande.test.jsonl.gz", rows + instruction("_ sat.", "Option1: A Option2: B ", "option1", blank)
    )
    header = "index\tpassage\tquestion\tlabel\n"
    write_gzip(qa / "boolq.validation_with_passage.tsv.gz", header + '0\tA "b\tis it\t0\n1\tC d" e\twas it so\t1\n')
    for split in ("test", "train"):
        lines = [json.dumps({"question": f"{i}+1?", "answer": f"So\n#### {i + 1}"}) + "\n" for i in range(6)]
        write_gzip(tmp_path / f"gsm8k/{split}.jsonl.gz", "".join(lines))
    header = "\ufeffType,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"
    row = 't,c,Why?,Best,"Best; Also so","No; Never;",s\n'
    write_gzip(qa / "truthfulqa.csv.gz", header + 2 * row)
    return tmp_path


def test_mmlu_rows(folder: Path) -> None:
    found = harness_files.mmlu(subject="anatomy", folder=str(folder))
    assert found["test"][:] == found["dev"][:]
    assert found["test"][0] == {
        "question": 'One, "two", 0?',
        "choices": ["0", "NA", "x", "y"],
        "answer": 2,
        "subject": "anatomy",
    }
    with pytest.raises(
        ValueError, match=r"mmlu/test.csv.gz must hold questions on law, got anatomy, us_foreign_policy"
    ):
        harness_files.mmlu(subject="law", folder=str(folder))


def test_multiple_choice_rows(folder: Path) -> None:
    place = str(folder)
    piqa = harness_files.piqa(folder=place)["test"]
    assert piqa[0] == {"goal": "open\na box", "sol1": "cut it ", "sol2": "Answer1: break", "label": 1}
    assert piqa["label"][:] == [1, 0]
    book = harness_files.openbookqa(folder=place)["train"][0]
    assert book["choices"] == {"text": ["a b", "c", "d", "e"], "label": ["A", "B", "C", "D"]}
    assert (book["question_stem"], book["answerKey"]) == ("The sun is", "D")
    social = harness_files.social_iqa(folder=place)["test"][0]
    assert social == {
        "context_question": "Tracy left. Why?",
        "answerA": "a",
        "answerB": "b",
        "answerC": "c",
        "label": "3",
    }
    blank = harness_files.winogrande(folder=place)["test"][0]
    assert blank == {"sentence": "So _ won.", "option1": "Ann", "option2": "Bo", "answer": "2"}


def test_other_rows(folder: Path) -> None:
    place = str(folder)
    assert harness_files.boolq(folder=place)["test"][:] == {
        "passage": ['A "b', 'C d" e'],
        "question": ["is it", "was it so"],
        "label": [0, 1],
    }
    assert harness_files.gsm8k(folder=place)["train"][1] == {"question": "1+1?", "answer": "So\n#### 2"}
    truth = harness_files.truthfulqa(folder=place)["test"][0]
    assert truth["question"] == "Why?"
    assert truth["mc1_targets"] == {"choices": ["Best", "No", "Never"], "labels": [1, 0, 0]}
    assert truth["mc2_targets"] == {"choices": ["Best", "Also so", "No", "Never"], "labels": [1, 1, 0, 0]}


def write_mmlu_part(folder: Path) -> Path:
    """A folder with a task of the subjects that are in the files."""
    folder.mkdir()
    subjects = [f"  - {{task: {name}, dataset_kwargs: {{subject: {name}}}}}\n" for name in SUBJECTS]
    lines = f"include: {TASK_FILES / 'mmlu_files.yaml'}\ngroup: mmlu_part\ntask:\n{''.join(subjects)}"
    (folder / "part.yaml").write_text(lines)
    return folder


def test_all_of_them_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    compile_ = env.compile
    monkeypatch.setattr(env, "compile", lambda source, *args: (compiled.append(source), compile_(source, *args))[1])
    names = [path.stem for path in TASK_FILES.glob("*.yaml")]
    assert sorted(names) == sorted([*ORIGINALS, "mmlu_files"])
    tasks = write_mmlu_part(tmp_path / "tasks")
    names = ["mmlu_part", *(name for name in names if name != "mmlu_files")]
    model, tokenizer = toy_model(), toy_tokenizer(tmp_path / "tokenizer")
    model.config.max_position_embeddings = 1024
    found = evaluate_harness(model, tokenizer, names, num_fewshot=1, limit=1, tasks_dir=tasks, data_dir=folder)
    # lm-eval alone compiles the templates of its prompts anew for each document.
    assert len(compiled) == len(set(compiled)) > 0
    assert "from_string" not in vars(env)
    assert [score.task for score in found.scores] == names
    scores = {score.task: score for score in found.scores}
    assert scores["gsm8k_files"].metric == "exact_match,strict-match"
    assert {score.num_fewshot for score in found.scores if not score.task.startswith("truth")} == {1}
    (prompt, answer), *_ = scores["mmlu_part"].samples["mmlu_part::us_foreign_policy"][0]["arguments"]
    question = 'One, "two", 0?\nA. 0\nB. NA\nC. x\nD. y\nAnswer:'
    about = "The following are multiple choice questions (with answers) about us foreign policy.\n\n"
    assert (prompt, answer) == (f"{about}{question} C\n\n{question}", " A")


def test_more_shots_than_there_are(folder: Path, tmp_path: Path) -> None:
    tokenizer = toy_tokenizer(tmp_path / "tokenizer")
    tasks = write_mmlu_part(tmp_path / "tasks")
    for name in ("gsm8k_files", "mmlu_part"):
        with pytest.raises(ValueError, match=f"num_fewshot must be what {name} has, got num_fewshot=7"):
            evaluate_harness(toy_model(), tokenizer, [name], num_fewshot=7, tasks_dir=tasks, data_dir=folder)


def test_files_that_are_missing_or_other(folder: Path) -> None:
    rule = "harness_data must be a folder that holds qa/piqa.test.jsonl.gz"
    with pytest.raises(ValueError, match=f"{rule}, got none; pass --harness-data"):
        harness_files.piqa()
    with pytest.raises(ValueError, match=f"{rule}, got harness_data=nowhere"):
        harness_files.piqa(folder="nowhere")
    write_gzip(folder / "qa/piqa.test.jsonl.gz", instruction("what", "Solution1: one\n\n", "solution1"))
    with pytest.raises(
        ValueError, match=r"must hold questions with Solution1 to Solution2 and an answer .* got line 1"
    ):
        harness_files.piqa(folder=str(folder))


def test_names_do_not_meet_lm_evals() -> None:
    manager = TaskManager(include_path=str(TASK_FILES), include_defaults=False)
    assert all(name.endswith("_files") for name in manager.all_tasks)
