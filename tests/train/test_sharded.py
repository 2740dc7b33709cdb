"""FSDP2, ZeRO and DDP over two processes do what one does with twice the batch, and the other way round.

On CPUs, by gloo; `LTE_TEST_BACKEND=nccl` takes two GPUs.
"""

from __future__ import annotations

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lte.train.sharding import OLDEST_DEEPSPEED, check_kind, prepare_deepspeed_, prepare_fsdp_
from lte.train.universal import is_of_other_processes, make_universal
from tests.processes import ON_GPUS, made_once, run_forked
from tests.train.toy import trainer_of

SETTINGS = {
    "learning_rate": 3e-3, "logging_steps": 1, "save_steps": 4, "router_fit_tokens": 512, "calibration_tokens": 2048,
    "stage1_steps": 10, "stage2_steps": 10,
}  # fmt: skip
FEW = {**SETTINGS, "stage1_steps": 3, "stage2_steps": 3, "save_steps": 2}
NARROW = {"gradient_accumulation_steps": 2, "bf16": True}
# Of which some are large enough for narrow moments.
SIZES = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 512}
METHOD = {"method": "sigma_moe", "config": {"expert_dropout": 0.0}, "train": {**FEW, "recipe": "method"}}
# Terms that are means over rows, pairs and chunks of tokens.
ADDED = {"even_weight": 0.3, "predecessor_weight": 0.3, "union_weight": 0.3, "price_on": "union", "learning_rate": 2e-2}
# Of each: what accelerate's launcher sets beside the usual (none at all is DDP), and how it trains.
CASES: list[dict[str, Any]] = [
    {"name": "fsdp", "fsdp": {}, "train": SETTINGS},
    {"name": "annealed", "fsdp": {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "uneven": True,
     "train": {**FEW, "recipe": "annealed"}},
    {"name": "ddp", "uneven": True, "train": {**SETTINGS, "recipe": "annealed"}},
    {"name": "ddp_added", "uneven": True, "train": {**FEW, **ADDED}},
    {"name": "dense", "fsdp": {}, "method": "dense", "train": {**FEW, "recipe": "dense"}},
    {"name": "method", "fsdp": {}, **METHOD},
    {"name": "narrow", "fsdp": {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "train": {**FEW, **NARROW}},
    *([{"name": "bf16_weights", "fsdp": {}, "sizes": SIZES, "train": {**FEW, "weights_dtype": "bfloat16"}}]
      if find_spec("torchao") else []),
    {"name": "offloaded", "fsdp": {"FSDP_OFFLOAD_PARAMS": "true"}, "uneven": True,
     "train": {**FEW, "optim": "adamw_torch_fused", "price_on": "union"}},
]  # fmt: skip
LESS_PRECISE = ("narrow", "bf16_weights")
LORA = {"fsdp": {}, "train": {**FEW, "recipe": "annealed", "lora_rank": 2}}
# In both stages routers train or are frozen; the checkpoint that is gone on from is of stage 2.
AGAIN: list[dict[str, Any]] = [
    {"name": "lora", **LORA},
    {"name": "lora_cut", "folder": "lora_run", "stop_at": 5, **LORA},
    {"name": "lora_resumed", "folder": "lora_run", "resume": True, **LORA},
    {"name": "cut", "folder": "run", "stop_at": 5, "fsdp": {}, "train": SETTINGS},
    {"name": "resumed", "folder": "run_again", "resume": True, "fsdp": {}, "train": SETTINGS},
]


def launch(count: int, root: Path, cases: list[dict[str, Any]]) -> None:
    def offloads(case: dict[str, Any]) -> bool:
        return "FSDP_OFFLOAD_PARAMS" in case.get("fsdp", {})

    # On GPUs processes whose weights lie on the CPU connect in another way.
    parts = [[case for case in cases if offloads(case) == each] for each in (False, True)] if ON_GPUS else [cases]
    for part in filter(None, parts):
        run_forked(str(count), "tests.train.sharded_in_process", root, json.dumps(part))


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folders of what one process and what two processes found."""

    def make(root: Path) -> None:
        launch(2, root / "2", [case for case in (*CASES, *AGAIN) if case["name"] != "resumed"])
        # One process goes on from the checkpoints of two.
        shutil.copytree(root / "2" / "run", root / "1" / "run_again")
        launch(1, root / "1", [*CASES, AGAIN[-1]])

    root = made_once(tmp_path_factory, "sharded", make)
    return {count: root / str(count) for count in (1, 2)}


def found_by(root: Path, name: str, rank: int = 0) -> dict[str, Any]:
    return torch.load(root / name / f"rank{rank}.pt")


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def check_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Losses and sparsity within 1e-4 in every step, and at most 0.1% of decisions apart."""
    pairs = [(mine, theirs) for mine, theirs in zip(one["log"], two["log"], strict=True) if "task_loss" in mine]
    assert len(pairs) >= 6
    for mine, theirs in pairs:
        terms = {name for name in mine if name.endswith("_loss")} | ({"active_fraction"} & set(mine))
        assert [theirs[term] for term in terms] == pytest.approx([mine[term] for term in terms], abs=1e-4)
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-5, abs=1e-4)
        assert theirs["eta"] == pytest.approx(mine["eta"], rel=1e-3)
    if one["decisions"] is not None:
        assert (one["decisions"] != two["decisions"]).float().mean() <= 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", [case["name"] for case in CASES if case["name"] not in LESS_PRECISE])
def test_two_processes_do_what_one_does(roots: dict[int, Path], name: str) -> None:
    one, two, other = found_by(roots[1], name), found_by(roots[2], name), found_by(roots[2], name, rank=1)
    is_ddp = name.startswith("ddp")
    assert two["kinds"] == (["Parameter"] if is_ddp else ["DTensor"])
    # Else a GPU would hold every gradient twice.
    assert two["gradients_in_buckets"] == ([True] if is_ddp else [])
    check_same(one, two)
    assert furthest(two["weights"], other["weights"]) == 0
    if name == "ddp_added":
        added = {f"{term}_loss" for term in ("even", "predecessor", "union", "chunk_efficiency")}
        assert all(added <= set(entry) for entry in two["log"] if "task_loss" in entry)
        for key, weight in one["weights"].items():
            torch.testing.assert_close(two["weights"][key], weight, rtol=1e-4, atol=1e-4, msg=key)
    # The thresholds are in the biases.
    biases = {key: value for key, value in one["weights"].items() if key.endswith("router.bias")}
    assert bool(biases) == (name not in ("dense", "method"))
    assert not biases or furthest(biases, {key: two["weights"][key] for key in biases}) < 1e-4


@pytest.mark.slow
def test_what_is_set_in_parts_is_what_the_first_process_says(roots: dict[int, Path]) -> None:
    for rank in range(2):
        assert torch.load(roots[2] / f"assigned{rank}.pt").unique().tolist() == [1.0]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_deepspeed_does_what_one_process_does(roots: dict[int, Path], tmp_path: Path) -> None:
    cases = [{**CASES[1], "name": f"zero{stage}", "zero": stage} for stage in (2, 3)]
    cases += [{**METHOD, "name": "zero3_method", "zero": 3}, {**LORA, "name": "zero3_lora", "zero": 3}]
    cases += [{"train": {**FEW, **NARROW}, "name": f"zero{stage}_bf16", "zero": stage} for stage in (2, 3)]
    # Of stage 2 and of stage 1; one process goes on.
    again = [{**cases[0], "name": "cut2", "stop_at": 5}, {**cases[1], "name": "cut3", "stop_at": 3}]
    cases = [{name: value for name, value in case.items() if name != "fsdp"} for case in (*cases, *again)]
    launch(2, tmp_path, cases)
    goes_on = {"stop_at": None, "resume": True}
    launch(1, tmp_path, [{**cut, "name": f"on{cut['zero']}", "folder": cut["name"], **goes_on} for cut in cases[-2:]])
    for wanted, name in ((found_by(roots[1], "method"), "method"), (found_by(roots[2], "lora"), "lora")):
        found = found_by(tmp_path, f"zero3_{name}")
        check_same(wanted, {**found, "decisions": found["made_decisions"]})
    for stage in (2, 3):
        assert found_by(tmp_path, f"zero{stage}_bf16")["router_dtypes"] == ["torch.float32"]
        losses = [
            [entry["task_loss"] for entry in found["log"] if "task_loss" in entry]
            for found in (found_by(roots[1], "narrow"), found_by(tmp_path, f"zero{stage}_bf16"))
        ]
        assert losses[0] == pytest.approx(losses[1], abs=0.05)
    one = found_by(roots[1], "annealed")
    for stage in (2, 3):
        two = found_by(tmp_path, f"zero{stage}")
        # Of ZeRO-3 the model that the first process gets: the sharded one runs in all processes at once.
        check_same(one, {**two, "decisions": two["decisions" if stage == 2 else "made_decisions"]})
        assert any(name.startswith("checkpoint-6/global_step") for name in two["files"])
        resumed = found_by(tmp_path, f"on{stage}")
        check_same(one, {**resumed, "decisions": resumed["decisions" if stage == 2 else "made_decisions"]})
        assert not any("universal" in name for name in resumed["files"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [case["name"] for case in CASES if case["name"] in LESS_PRECISE])
def test_routers_are_in_fp32_beside_layers_in_bf16(roots: dict[int, Path], name: str) -> None:
    """With `bf16`, and of weights in bf16 with the 8-bit moments that `lte train` takes for them."""
    one, two = found_by(roots[1], name), found_by(roots[2], name)
    assert one["router_dtypes"] == two["router_dtypes"] == ["torch.float32"]
    assert two["layer_dtypes"] == ["torch.bfloat16"]
    losses = [[entry["task_loss"] for entry in found["log"] if "task_loss" in entry] for found in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=0.05)
    assert (one["decisions"] != two["decisions"]).float().mean() < 0.03


@pytest.mark.slow
def test_a_process_goes_on_from_the_shards_of_two(roots: dict[int, Path]) -> None:
    whole, resumed = found_by(roots[2], "fsdp"), found_by(roots[1], "resumed")
    assert any("pytorch_model_fsdp_0/__1_0.distcp" in name for name in found_by(roots[2], "cut")["files"])
    last = [entry for entry in whole["log"] if "task_loss" in entry][-1]
    again = [entry for entry in resumed["log"] if "task_loss" in entry]
    assert len(again) == 20
    assert again[-1]["task_loss"] == pytest.approx(last["task_loss"], abs=1e-4)
    assert (whole["decisions"] != resumed["decisions"]).float().mean() <= 1e-3


@pytest.mark.slow
def test_adapters_go_on_with_their_routers(roots: dict[int, Path]) -> None:
    whole, resumed = found_by(roots[2], "lora"), found_by(roots[2], "lora_resumed")
    assert furthest(whole["weights"], resumed["weights"]) == 0
    assert any("modules_to_save" in name for name in whole["weights"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp", "lora"])
def test_the_first_process_gets_the_whole_model(roots: dict[int, Path], name: str) -> None:
    found, other = found_by(roots[2], name), found_by(roots[2], name, rank=1)
    assert torch.equal(found["made_decisions"], found["decisions"])
    assert other["made"] is None
    if name == "fsdp":
        assert furthest(found["made"], found["weights"]) == 0
    else:
        assert not any("lora" in key for key in found["made"])


def test_checkpoints_of_another_kind_of_shards_are_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "run")
    trainer.train()
    newest = tmp_path / "run" / "checkpoint-6"
    check_kind(newest, None)
    with pytest.raises(
        ValueError, match=r"must be sharded as it was, got shards of FSDP where .* is of a model that is"
    ):
        check_kind(newest, "FSDP")
    (newest / "pytorch_model_fsdp_0").mkdir()
    with pytest.raises(ValueError, match=r"must be sharded as it was, got a model that is whole in each process where"):
        check_kind(newest, None)


def test_a_checkpoint_that_deepspeed_cannot_convert_names_its_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = tmp_path / "global_step6"
    shards.mkdir()
    assert not is_of_other_processes(tmp_path)
    for rank in range(2):
        (shards / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    assert is_of_other_processes(tmp_path)
    (tmp_path / "global_step6_universal").mkdir()
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(ValueError, match=r"num_processes must stay what it was .* got 1 where .* by 2, .* launch 2"):
        make_universal(tmp_path)
    assert list(tmp_path.iterdir()) == [shards]


def test_older_versions_of_deepspeed_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.9.5")
    with pytest.raises(ValueError, match=r"deepspeed must be of version .* or newer, got deepspeed=0.9.5; pip install"):
        prepare_deepspeed_(SimpleNamespace(deepspeed_config={}))


@pytest.mark.parametrize(
    ("given", "kept"),
    [({"bf16": {"enabled": True}}, False), ({"bf16": {"enabled": False}}, True),
     ({"bf16": {"enabled": True}, "torch_autocast": {"enabled": False}}, True)],
)  # fmt: skip
def test_deepspeed_trains_in_bf16_by_autocast_unless_its_config_says_how(
    given: dict[str, Any], kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: OLDEST_DEEPSPEED)
    plugin = SimpleNamespace(deepspeed_config=dict(given))
    prepare_deepspeed_(plugin)
    autocast = {"bf16": {"enabled": False}, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    assert plugin.deepspeed_config == (given if kept else autocast)


def test_fsdp_of_version_1_is_refused() -> None:
    with pytest.raises(ValueError, match="fsdp_version must be 2, got fsdp_version=1; take accelerate's config"):
        prepare_fsdp_(SimpleNamespace(fsdp_version=1), SimpleNamespace(optim="adamw_torch"), torch.nn.Module(), None)


def test_weights_on_the_cpu_for_a_gpu_that_is_not_there_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ACCELERATE_USE_FSDP", "FSDP_OFFLOAD_PARAMS"):
        monkeypatch.setenv(name, "true")
    with pytest.warns(UserWarning, match="fsdp_offload_params keeps weights, gradients and moments on the CPU"):
        trainer_of(tmp_path)


def test_fsdp_refuses_all_optimisers_of_bitsandbytes() -> None:
    handlers = pytest.importorskip("transformers.trainer_optimizer")._OPTIMIZER_HANDLERS
    handled = {getattr(name, "value", name): handler.__name__ for name, handler in handlers.items()}
    names = {name for name, handler in handled.items() if handler == "_get_bitsandbytes_optimizer"}
    assert len(names) >= 15
    for name in names:
        with pytest.raises(ValueError, match=f"optim must be none of bitsandbytes, .* got optim={name}; take adamw_"):
            prepare_fsdp_(SimpleNamespace(fsdp_version=2), SimpleNamespace(optim=name), torch.nn.Module(), None)
