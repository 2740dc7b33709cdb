"""Saving is all or nothing: whatever stops it, a folder loads as it was, as it shall be, or not at all."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, modeling_utils

import lte
from tests.tiny_models import randomise_routers_, tiny_sparse_model

SHARDS = {"max_shard_size": "20KB"}


def new_model() -> Any:
    """A model that differs from the old one in every part that decides."""
    model = randomise_routers_(tiny_sparse_model(), seed=9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


@torch.no_grad()
def load_logits(folder: Path, tokens: Tensor) -> Tensor | None:
    """Logits of the model in `folder`, `None` if it does not load."""
    try:
        model = AutoModelForCausalLM.from_pretrained(folder)
    except (OSError, ValueError):
        return None
    return model.eval()(tokens).logits


# Forks once per step of a save and kills the child there: with half of the files written, after a deletion or move.
# One more child saves under a limit on file sizes.
CRASHING_PROGRAM = """
import json, os, pathlib, resource, shutil, signal, sys
import torch
torch.set_num_threads(1)
import lte
from transformers import AutoConfig, AutoModelForCausalLM, modeling_utils

import lte

root = pathlib.Path(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(root / "new")

def save_until(target, last_step):
    steps = 0

    def step(kind):
        nonlocal steps
        steps += 1
        if steps > last_step:
            target.with_suffix(".kind").write_text(kind)
            os.kill(os.getpid(), signal.SIGKILL)

    save_file, unlink, replace = modeling_utils.safe_save_file, pathlib.Path.unlink, pathlib.Path.replace

    def crashing_save_file(tensors, path, **kwargs):
        save_file(tensors, path, **kwargs)
        data = pathlib.Path(path).read_bytes()
        pathlib.Path(path).write_bytes(data[: len(data) // 2])
        step("half")
        pathlib.Path(path).write_bytes(data)

    def crashing_unlink(self, *args, **kwargs):
        unlink(self, *args, **kwargs)
        step("delete" if self.parent == target else "half")

    def crashing_replace(self, other):
        replace(self, other)
        step("move" if pathlib.Path(other).parent == target else "half")

    modeling_utils.safe_save_file = crashing_save_file
    pathlib.Path.unlink, pathlib.Path.replace = crashing_unlink, crashing_replace
    model.save_pretrained(target, max_shard_size="20KB")

def save_under_limit(target):
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
    try:
        model.save_pretrained(target)
    except OSError as error:
        target.with_suffix(".message").write_text(str(error))

def run_child(task, *args):
    child = os.fork()
    if child == 0:
        try:
            task(*args)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])

for start in ("fresh", "single", "sharded"):
    for last_step in range(100):
        target = root / f"over-{start}" / str(last_step)
        target.parent.mkdir(exist_ok=True)
        if start != "fresh":
            shutil.copytree(root / start, target)
        if not run_child(save_until, target, last_step):
            break
(root / "limited").mkdir()
run_child(save_under_limit, root / "limited" / "model")
"""


@pytest.fixture(scope="module")
def crashes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what every crash left: `over-<start>/<step>`, beside what kind of step it died in."""
    root = tmp_path_factory.mktemp("crashes")
    tiny_sparse_model().save_pretrained(root / "single")
    tiny_sparse_model().save_pretrained(root / "sharded", **SHARDS)
    new_model().save_pretrained(root / "new")
    command = [sys.executable, "-c", CRASHING_PROGRAM, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return root


@pytest.mark.parametrize("start", ["fresh", "single", "sharded"])
def test_a_killed_save_never_leaves_a_mix(start: str, tokens: Tensor, crashes: Path) -> None:
    old, new = load_logits(crashes / "single", tokens), load_logits(crashes / "new", tokens)
    assert old is not None
    assert new is not None
    assert not torch.allclose(old, new)
    runs, kinds = crashes / f"over-{start}", []
    for kind_file in runs.glob("*.kind"):
        folder, kind = kind_file.with_suffix(""), kind_file.read_text()
        kinds.append(kind)
        found = load_logits(folder, tokens)
        if kind == "half":
            assert found is None if start == "fresh" else torch.equal(found, old), folder  # type: ignore[arg-type]
        elif found is not None:
            assert torch.equal(found, new), f"{folder} loads, and is neither the old nor the new model"
        for partial in runs.glob(f"**/.{folder.name}.partial-*"):
            left = load_logits(partial, tokens)
            assert left is None or torch.equal(left, new), partial
    finished = load_logits(runs / str(len(kinds)), tokens)
    assert finished is not None, "the run that nobody killed must have saved"
    assert torch.equal(finished, new)
    assert kinds.count("half") > 2
    assert kinds.count("move") > 4
    assert "delete" in kinds


def test_a_real_write_error_is_reported_with_the_folder(crashes: Path) -> None:
    """The operating system's own limit on file sizes."""
    folder = crashes / "limited" / "model"
    message = folder.with_suffix(".message")
    assert f"could not save to {folder}, which is left as it was: " in message.read_text()
    assert list(folder.parent.iterdir()) == [message]


FULL_DISK = [
    OSError(errno.ENOSPC, "No space left on device"),
    SafetensorError("I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", FULL_DISK, ids=["python", "safetensors"])
@pytest.mark.parametrize("start", ["fresh", "single", "sharded"])
def test_a_full_disk_leaves_what_was_there(
    start: str, error: Exception, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    old = tiny_sparse_model()
    if start != "fresh":
        old.save_pretrained(folder, **(SHARDS if start == "sharded" else {}))
    before = {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}
    save_file, calls = modeling_utils.safe_save_file, []

    def fill_up(tensors: Any, path: Any, **kwargs: Any) -> None:
        calls.append(path)
        if len(calls) == 3:
            Path(path).write_bytes(b"half")
            raise error
        save_file(tensors, path, **kwargs)

    monkeypatch.setattr(modeling_utils, "safe_save_file", fill_up)
    with pytest.raises(OSError, match=r"could not save to .*model, which is left as it was: .*No space left"):
        new_model().save_pretrained(folder, **SHARDS)
    assert {path.name: path.read_bytes() for path in folder.glob("*")} == before
    assert {path.name for path in tmp_path.iterdir()} == ({"model"} if before else set())
    if before:
        with torch.no_grad():
            assert torch.equal(load_logits(folder, tokens), old(tokens).logits)


def test_other_files_of_the_folder_stay(tmp_path: Path, tokens: Tensor) -> None:
    folder = tmp_path / "model"
    tiny_sparse_model().save_pretrained(folder, **SHARDS)
    (folder / "tokenizer.json").write_text("{}")
    new_model().save_pretrained(folder)
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert [path.name for path in folder.glob("model*")] == ["model.safetensors"]
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_ranks_other_than_the_first_do_no_harm(tmp_path: Path, tokens: Tensor) -> None:
    folder, model = tmp_path / "model", tiny_sparse_model()
    model.save_pretrained(folder, is_main_process=False)
    assert load_logits(folder, tokens) is None
    model.save_pretrained(folder)
    model.save_pretrained(folder, is_main_process=False)
    with torch.no_grad():
        assert torch.equal(load_logits(folder, tokens), model(tokens).logits)


def test_saving_adapters_beside_a_model_keeps_the_model(tmp_path: Path, tokens: Tensor) -> None:
    folder, model = tmp_path / "model", tiny_sparse_model()
    model.save_pretrained(folder)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(folder)
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "adapter_config.json"} <= names


@pytest.mark.parametrize("name", ["model", "model/", "deep/er/model", "."])
def test_relative_paths(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: Tensor) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_sparse_model()
    model.save_pretrained(name)
    with torch.no_grad():
        assert torch.equal(load_logits(Path(name), tokens), model(tokens).logits)


def test_a_symlink_to_a_folder_is_followed(tmp_path: Path, tokens: Tensor) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    tiny_sparse_model().save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert load_logits(tmp_path / "real", tokens) is not None


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("")
    with pytest.raises(ValueError, match=r"save_directory must be a folder, got save_directory=.*model"):
        tiny_sparse_model().save_pretrained(tmp_path / "model")


def test_a_moved_folder_loads(tmp_path: Path, tokens: Tensor) -> None:
    tiny_sparse_model().save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert str(tmp_path) not in json.dumps(config), "a folder must not remember where it was"
    shutil.move(tmp_path / "model", tmp_path / "moved")
    assert load_logits(tmp_path / "moved", tokens) is not None


def test_beside_an_engine_a_config_names_the_sparse_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM goes by the name, and runs no model dense where lte is imported; transformers serves by the stock name."""
    tiny_sparse_model().save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).architectures == ["LlamaForCausalLM"]
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.architectures == ["LteLlamaForCausalLM"]
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert lte.densify_(model).config.architectures == ["LlamaForCausalLM"]
