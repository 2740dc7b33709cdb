"""Two processes (gloo on the CPU, NCCL where there are two GPUs) do what one process does with twice the batch."""

import json

import pytest
import torch

from tests.processes import run_processes

OPTIONS = {"learning_rate": 3e-3, "logging_steps": 2, "save_steps": 4, "router_fit_tokens": 512,
           "calibration_tokens": 2048, "stage1_steps": 6, "stage2_steps": 6}  # fmt: skip


@pytest.mark.parametrize("recipe", ["straight_through", "annealed"])
def test_two_processes_equal_one_with_twice_the_batch(tmp_path, recipe):
    found = {}
    for name, count in (("one", 1), ("two", 2)):
        # Rows are counted by the threshold: what `annealed` may differ in would change a count here and there.
        even = {"even_weight": 0.3} if recipe == "straight_through" else {}
        options = json.dumps({**OPTIONS, **even, "recipe": recipe, "batch_size": 8 // count})
        run_processes(count, "tests.train.train_in_process", tmp_path / name, options)
        for path in sorted((tmp_path / name).glob("rank*.pt")):
            found[name, path.stem] = torch.load(path)
    assert sorted(found) == [("one", "rank0"), ("two", "rank0"), ("two", "rank1")]
    one = found["one", "rank0"]
    for two in (found["two", "rank0"], found["two", "rank1"]):
        # Else a GPU would hold every gradient twice.
        assert two["gradients_in_buckets"] == [True]
        # The bias control of `annealed` goes by the mean of both processes' quantiles: not quite the quantile of all.
        tolerance = 1e-3 if recipe == "annealed" else 1e-5
        for name, weight in one["weights"].items():
            torch.testing.assert_close(two["weights"][name], weight, rtol=1e-4, atol=tolerance, msg=name)
        for mine, theirs in zip(one["log"], two["log"], strict=True):
            even_log = ["even_loss"] if recipe == "straight_through" else []
            terms = ["task_loss", "efficiency_loss", "active_fraction", "eta", *even_log] if "task_loss" in mine else []
            assert [mine[term] for term in terms] == pytest.approx([theirs[term] for term in terms], rel=1e-3)
