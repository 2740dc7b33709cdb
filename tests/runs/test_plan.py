"""What the file of a comparison expands to, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from lte.data.config import DataConfig
from lte.data.tasks.registry import TaskConfig
from lte.runs.plan import Run, affects, plan_runs
from lte.runs.settings import read_comparison
from lte.settings import option
from lte.train.config import TrainConfig
from tests.runs.conftest import write_comparison

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
# Records that each file asks for.
EXAMPLES = {
    **{f"compare/{task}": 68 for task in ("cola", "mrpc", "rte", "sst2", "stsb")},
    "compare/e2e": 47,
    "compare/dialogsum": 50,
    "compare/wikipedia": 53,
    "compare/wikitext2": 56,
    "compare/wikipedia_books": 9,
    "compare/qwen_coder_0_5b": 32,
    "compare/qwen_coder_1_5b": 30,
    "compare/qwen_coder_1_5b_instruct": 8,
    "compare/instruct": 19,
    "ablations/chat_questions": 5,
    "ablations/eta": 48,
    "ablations/expert_size": 18,
    "ablations/grouping": 18,
    "ablations/lambda": 15,
    "ablations/lora": 5,
    "ablations/mrpc_90": 39,
    "ablations/noisy_topk": 15,
    "ablations/paper_stage2": 3,
    "ablations/routers": 12,
    "ablations/sst2_80": 27,
    "ablations/stage2": 15,
    "ablations/switching": 12,
    "ablations/wikipedia_recipe": 4,
    "ablations/wikipedia_fewer_articles": 6,
    "recipe/forgetting": 5,
    "recipe/ideas": 20,
    "recipe/ideas_low_rate": 26,
    "recipe/steady": 6,
    "recipe/company": 45,
    "recipe/teacher": 3,
    "recipe/tokens": 7,
}
# In their folder beside them: the mixes that they train on, and a run of `lte train`.
OTHERS = {"recipe/texts", "recipe/texts_and_tasks", "recipe/one_run"}


def plan(path: Path, **overrides: Any) -> dict[str, Run]:
    return {run.name: run for run in plan_runs(read_comparison(path, **overrides))}


def test_every_method_target_and_seed_is_a_run(mrpc: Callable[..., Path]) -> None:
    methods = ["dense", "lte", "cats", {"method": "sigma_moe", "sparsities": [0.25], "seeds": [1]}]
    runs = plan(mrpc(*methods, seeds=[0, 1], sparsities=[0.5, 0.8]))
    measured = {name for name, run in runs.items() if run.measured}
    targets = [f"{method}-{target}" for method in ("lte", "cats") for target in (0.5, 0.8)]
    expected = {f"{one}-seed{seed}" for one in ("dense-0", *targets) for seed in (0, 1)} | {"sigma_moe-0.25-seed1"}
    assert measured == expected
    assert set(runs) - measured == {"start-seed0", "start-seed1"}
    for name, run in runs.items():
        assert list(runs).index(name) > max([list(runs).index(p) for p in (run.base, run.teacher) if p], default=-1)


def test_what_trains_starts_from_the_start_and_what_does_not_from_the_control(mrpc: Callable[..., Path]) -> None:
    methods = [
        *("cats", "lte", "dense", "static_pruning", "noisy_topk"),
        {"method": "deja_vu", "fine_tune": True},
        {"method": "kla", "base": "start"},
        {"method": "moefication", "relu": True},
        {"method": "dense", "label": "before", "fine_tune": False, "base": "start"},
    ]
    runs = plan(mrpc(*methods))
    base = {name.removesuffix("-seed0"): run.base for name, run in runs.items()}
    assert {name for name, start in base.items() if start == "start-seed0"} == {
        *("lte-0.5", "dense-0", "static_pruning-0.5", "noisy_topk-0.5", "deja_vu-0.5", "kla-0.5", "before-0"),
        "control-relu",
    }
    assert base["cats-0.5"] == "dense-0-seed0"
    assert base["moefication-relu-0.5"] == "control-relu-seed0"
    # The activation is replaced once, before the control trains.
    assert [run.name for run in runs.values() if run.relu] == ["control-relu-seed0"]
    assert {run.recipe for run in runs.values()} == {"dense", "straight_through", "method"}
    assert [run.trains for run in map(runs.__getitem__, ("kla-0.5-seed0", "before-0-seed0"))] == [False, False]


def test_all_that_train_have_the_budget_and_the_data_order_of_the_control(mrpc: Callable[..., Path]) -> None:
    methods = ["dense", "lte", "static_pruning", "sigma_moe", {"method": "moefication", "relu": True}]
    runs = plan(mrpc(*methods, train={"stage1_epochs": 2, "stage2_epochs": 3, "learning_rate": 1e-4}))
    trained = [run.train_config for run in runs.values() if run.trains and run.base]
    budget = ("stage1_epochs", "stage2_epochs", "stage1_steps", "batch_size", "learning_rate", "seed")
    assert len(trained) == 5
    assert len({tuple(getattr(config, name) for name in budget) for config in trained}) == 1
    assert runs["start-seed0"].train_config.learning_rate == 1e-3


def test_the_teacher_is_the_start_of_the_seed(mrpc: Callable[..., Path]) -> None:
    taught = {"method": "lte", "label": "taught", "distill_from": "start"}
    runs = plan(mrpc("lte", taught, seeds=[3]))
    assert runs["taught-0.5-seed3"].teacher == "start-seed3"
    assert runs["taught-0.5-seed3"].train_config.distillation_weight == 1
    assert runs["lte-0.5-seed3"].teacher is None
    runs = plan(mrpc("dense", "lte", "cats", defaults={"distill_from": "start"}))
    assert {name for name, run in runs.items() if run.teacher} == {"dense-0-seed0", "lte-0.5-seed0"}


def test_a_control_that_is_not_listed_is_made_without_a_record(mrpc: Callable[..., Path]) -> None:
    runs = plan(mrpc("cats", "kla", {"method": "teal", "learning_rate": 2e-3}))
    assert runs["cats-0.5-seed0"].base == runs["kla-0.5-seed0"].base == "control-seed0"
    # One that trained in another way is another one.
    assert runs["teal-0.5-seed0"].base == "control-teal-seed0"
    assert not runs["control-seed0"].measured


def test_settings_of_methods_reach_their_configs(mrpc: Callable[..., Path]) -> None:
    methods = [
        {"method": "wanda", "pattern": "2:4"},
        {"method": "lte", "grouping": "contribution", "recipe": "paper", "lambda": 0.25, "stages": 1},
    ]
    runs = plan(mrpc(*methods))
    assert runs["wanda-0.5-seed0"].method_config.to_dict()["pattern"] == "2:4"
    sparse = runs["lte-0.5-seed0"]
    assert (sparse.method_config.grouping, sparse.method_config.expert_size) == ("contribution", 8)
    assert (sparse.train_config.recipe, sparse.train_config.lambda_, sparse.stages) == ("paper", 0.25, (1,))


def test_a_fingerprint_tells_of_settings_that_decide_the_weights(mrpc: Callable[..., Path]) -> None:
    def prints(**content: Any) -> dict[str, str]:
        return {name: run.fingerprint for name, run in plan(mrpc("lte", "dense", **content)).items()}

    before = prints()
    assert prints(defaults={"logging_steps": 7}) == before
    later = prints(train={"stage1_steps": 3, "stage2_steps": 2})
    assert {name for name in before if before[name] != later[name]} == {"lte-0.5-seed0", "dense-0-seed0"}
    assert not set(prints(start={"stage1_steps": 3}).values()) & set(before.values())


def test_a_new_setting_enters_the_fingerprint(mrpc: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(kw_only=True)
    class Longer(TrainConfig):
        new: int = 1

    @dataclass(kw_only=True)
    class Louder(TrainConfig):
        new: int = option(1, "Something.", affects="nothing")

    file = mrpc("lte", "teal")
    before = plan(file)
    # The name of the class is part of it.
    Longer.__name__ = Louder.__name__ = "TrainConfig"
    monkeypatch.setattr("lte.runs.plan.TrainConfig", Louder)
    assert {name: run.fingerprint for name, run in plan(file).items()} == {
        name: run.fingerprint for name, run in before.items()
    }
    monkeypatch.setattr("lte.runs.plan.TrainConfig", Longer)
    after = plan(file)
    assert all(after[name].fingerprint != run.fingerprint for name, run in before.items())


def test_what_a_setting_affects_is_one_of_three() -> None:
    kinds = {f.name: affects(f) for cls in (TaskConfig, DataConfig, TrainConfig) for f in fields(cls)}
    assert set(kinds.values()) == {"weights", "routing", "nothing"}
    assert (kinds["learning_rate"], kinds["eta"], kinds["save_steps"]) == ("weights", "routing", "nothing")


def test_a_fingerprint_tells_of_thresholds_on_own_answers(tmp_path: Path) -> None:
    def prints(task: str, **defaults: Any) -> dict[str, str]:
        methods = ["dense", "lte", {"method": "lte", "label": "paper", "recipe": "paper"}]
        file = write_comparison(tmp_path / "a.yaml", task=task, model="m", methods=methods, defaults=defaults)
        return {name: run.fingerprint for name, run in plan(file).items()}

    before, after = prints("e2e"), prints("e2e", calibration_answers=0)
    assert {name for name in before if before[name] != after[name]} == {"lte-0.5-seed0"}
    assert prints("e2e", calibration_answers=256) == before
    assert prints("e2e", calibration_tokens=0)["lte-0.5-seed0"] != before["lte-0.5-seed0"]
    # Nothing is written there.
    assert prints("mrpc") == prints("mrpc", calibration_answers=0)


def test_text_files_lie_below_the_data_folder(tmp_path: Path) -> None:
    defaults = {"train": ["a.jsonl", "/b.jsonl", "pydoc-topics"], "validation": "c.jsonl"}
    file = write_comparison(tmp_path / "text.yaml", model="m", methods=["lte"], defaults=defaults)
    run = plan(file, data_dir="/data")["lte-0.5-seed0"]
    assert run.values["train"] == ["/data/a.jsonl", "/b.jsonl", "pydoc-topics"]
    assert run.values["validation"] == "/data/c.jsonl"
    assert plan(file)["lte-0.5-seed0"].values["validation"] == "c.jsonl"


def test_seeds_of_the_command_go_first(mrpc: Callable[..., Path]) -> None:
    comparison = read_comparison(mrpc("lte", {"method": "cats", "seeds": [7]}), seeds=[4, 5], latency=True)
    assert [entry.seeds for entry in comparison.entries] == [(4, 5), (4, 5)]
    assert comparison.flags == ("--seeds", "4,5", "--latency")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"taks": "mrpc"}, "(did you mean task?)"),
        ({"methods": []}, "methods must be a list of methods, got methods=[]"),
        ({"methods": ["lt"]}, "(did you mean lte?)"),
        ({"methods": [{"label": "x"}]}, "methods must hold names, or mappings with a method"),
        ({"methods": [{"method": "lte", "grp": 1}]}, "got grp (did you mean group"),
        ({"methods": [{"method": "cats", "pattern": "2:4"}]}, "must be a setting, got pattern"),
        ({"methods": [{"method": "lte", "target_sparsity": 0.5}]}, "target_sparsity must be left out of methods"),
        ({"methods": [{"method": "lte", "label": "a/b"}]}, "label must be part of a file name, got label='a/b'"),
        ({"methods": [{"method": "cats", "recipe": "pape"}]}, "recipe must be left out for method=cats, got recipe="),
        ({"methods": [{"method": "wanda", "fine_tune": True}]}, "fine_tune must be false for method=wanda"),
        ({"methods": [{"method": "lte", "base": "strat"}]}, "did you mean start"),
        ({"methods": [{"method": "lte", "stages": "3"}]}, "stages must be one of both, 1, 2"),
        ({"methods": ["lte", "lte"]}, "label must differ from that of other methods, got two runs lte-0.5-seed0"),
        ({"methods": [{"method": "lte", "distillation_weight": 1.0}]}, "distillation_weight must be positive with"),
        ({"methods": [{"method": "lte", "match_weight": 1.0}]}, "match_to must be own without a teacher"),
        ({"methods": [{"method": "lte", "stages": "1", "margin_weight": 1.0}]}, "margin_weight must be 0 without"),
        ({"methods": [{"method": "wanda", "pattern": "2:4", "sparsities": [0.8]}]}, "target_sparsity must be 0.5"),
        ({"sparsities": [1.0]}, "sparsities must lie in [0, 1), got sparsities=1.0"),
        ({"sparsities": "half"}, "sparsities must be a list of numbers, got sparsities='half'"),
        ({"seeds": [0.5]}, "seeds must be a list of numbers, got seeds=[0.5]"),
        ({"defaults": {"learning_rat": 1}}, "got learning_rat (did you mean learning_rate"),
        ({"defaults": {"seed": 1}}, "got seed=1; it is set by seeds"),
        ({"start": [1]}, "start must be a mapping of settings, got start=[1]"),
        ({"train": "x.jsonl"}, "train must be a mapping with the budget, got train='x.jsonl'"),
        ({"task": None}, "task must be given, or text: defaults: {train: FILE} or {mix: FILE}, got neither"),
        ({"model": None}, "model must be given: --model, or model: in"),
        ({"dtype": "float64"}, "dtype must be one of float32, bfloat16, float16"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    file = write_comparison(tmp_path / "c.yaml", **{"task": "mrpc", "model": "m", "methods": ["lte"], **content})
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(file)


def test_a_missing_file_and_a_list_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="file must be an existing YAML file, got file="):
        read_comparison(tmp_path / "no.yaml")
    (tmp_path / "list.yaml").write_text("- lte\n")
    with pytest.raises(ValueError, match="file must hold `name: value` lines, got a list"):
        read_comparison(tmp_path / "list.yaml")


@pytest.mark.parametrize("size", [0, 1.5, True, "many"])
def test_rows_of_a_measuring_pass_are_a_whole_number(mrpc: Callable[..., Path], size: object) -> None:
    with pytest.raises(ValueError, match="eval_batch_size must be a whole number from 1, got eval_batch_size="):
        read_comparison(mrpc("lte", eval_batch_size=size))


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_expand(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Where a mix is looked for.
    monkeypatch.chdir(EXPERIMENTS.parent)
    runs = plan(EXPERIMENTS / f"{name}.yaml")
    assert sum(run.measured for run in runs.values()) == EXAMPLES[name]


def test_no_example_is_left_out() -> None:
    files = [path for folder in ("compare", "ablations", "recipe") for path in EXPERIMENTS.glob(f"{folder}/*.yaml")]
    assert {f"{path.parent.name}/{path.stem}" for path in files} == set(EXAMPLES) | OTHERS
