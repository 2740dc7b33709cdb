"""Conversion a layer at a time gives what conversion in memory gives, goes on after a kill, and needs little memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

import lte
from lte.hf import streaming
from lte.hf.rope_fields import rope_fields
from lte.hf.streamed_activity import StreamedActivity
from lte.hf.streaming import WORK_FOLDER, StreamedFolder, open_checkpoint
from lte.hf.tensor_files import NewTensor, write_tensors
from lte.runs import conversion
from lte.runs.conversion import convert_folder, densify_folder
from tests.tiny_models import EXPERT_SIZE, MODEL_TYPES, auto_class, logits_of, tiny_config, tiny_dense_model

CONFIG = lte.LteConfig(expert_size=EXPERT_SIZE, seed=3)


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same(folder: Path, other: Path, **added: Any) -> None:
    """Two folders hold the same weights, bit for bit, and the same config but for the fields `added` to the first."""
    found, wanted = tensors(folder), tensors(other)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
    fields = json.loads((other / "config.json").read_text())
    assert json.loads((folder / "config.json").read_text()) == {**fields, **added}


def converted_in_memory(folder: Path, config: lte.LteConfig, model_type: str = "llama", **loading: Any) -> Path:
    model = auto_class(model_type).from_pretrained(folder, **{"dtype": "auto", **loading})
    lte.sparsify_(model, config).save_pretrained(folder.with_name("in-memory"))
    return folder.with_name("in-memory")


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    tiny_dense_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_both_ways_of_every_family(model_type: str, tmp_path: Path) -> None:
    dense, sparse, back = tmp_path / "dense", tmp_path / "sparse", tmp_path / "back"
    tiny_dense_model(model_type).to(torch.bfloat16).save_pretrained(dense, max_shard_size="20KB")
    config = lte.LteConfig(expert_size=EXPERT_SIZE, seed=3, router_rank=4)
    convert_folder(dense, sparse, config)
    assert_same(sparse, converted_in_memory(dense, config, model_type))
    assert not lte.verify(sparse)
    densify_folder(sparse, back)
    model = auto_class(model_type).from_pretrained(sparse, dtype="auto")
    lte.densify_(model).save_pretrained(tmp_path / "back-in-memory")
    assert_same(back, tmp_path / "back-in-memory", **rope_fields(model.config.to_dict()))
    # transformers 5 must read the same out of both.
    rope = getattr(model.config, "rope_parameters", None)
    assert getattr(AutoConfig.from_pretrained(back), "rope_parameters", None) == rope
    assert not (back / WORK_FOLDER).exists()
    assert not list(back.glob(".*.partial"))


def test_a_scaled_rotary_embedding_is_one_of_transformers_4_too(tmp_path: Path) -> None:
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = 32
    long: dict[str, Any] = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    for model_type, scaling, wanted in (
        ("llama", llama3, llama3),
        # Which takes no field more, and no other name.
        ("phi3", {"rope_type": "longrope", **long}, {"type": "longrope", **long}),
    ):
        rope, own = {**scaling, "rope_theta": 500000.0}, {"original_max_position_embeddings": 32}
        dense = tiny_dense_model(model_type, rope_parameters=rope, **(own if model_type == "phi3" else {}))
        sparse, back = tmp_path / model_type, tmp_path / f"{model_type}-back"
        lte.sparsify_(dense, CONFIG).save_pretrained(sparse)
        densify_folder(sparse, back)
        fields = json.loads((back / "config.json").read_text())
        assert fields["rope_theta"] == 500000.0
        assert fields["rope_scaling"] == wanted
        # transformers 5 must read the same as without them; it keeps the older name beside its own.
        found = AutoConfig.from_pretrained(back).rope_parameters
        found.pop("type", None)
        assert found == AutoConfig.from_pretrained(sparse).rope_parameters


@pytest.mark.parametrize(
    "changes",
    [{"dropped_bias": True}, {"grouping": "random"}, {"grouping": "contiguous", "threshold": 0.3}],
    ids=["dropped_bias", "random", "contiguous"],
)
def test_other_settings(changes: dict[str, Any], dense: Path, tmp_path: Path) -> None:
    config = lte.LteConfig(expert_size=EXPERT_SIZE, **changes)
    convert_folder(dense, tmp_path / "sparse", config)
    assert_same(tmp_path / "sparse", converted_in_memory(dense, config))


def text_of(model_type: str = "llama") -> list[dict[str, Tensor]]:
    """Batches with padding, and of another length."""
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randint(3, 40, shape, generator=generator) for shape in ((2, 12), (1, 20)))
    padded = {"input_ids": first, "attention_mask": torch.ones_like(first)}
    padded["attention_mask"][1, 7:] = 0
    return [padded, {"input_ids": second}]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize(
    "changes",
    [{"grouping": "contribution", "always_on": 0.2}, {"grouping": "coactivation"}, {"always_on": 0.2}],
    ids=["contribution", "coactivation", "kmeans"],
)
def test_groups_by_activations(model_type: str, changes: dict[str, Any], tmp_path: Path) -> None:
    dense, sparse = tmp_path / "dense", tmp_path / "sparse"
    tiny_dense_model(model_type).to(torch.bfloat16).save_pretrained(dense)
    config = lte.LteConfig(expert_size=EXPERT_SIZE, seed=3, **changes)
    if tiny_config(model_type).is_encoder_decoder:
        with pytest.raises(ValueError, match="grouping must go by weights where an encoder-decoder is converted layer"):
            convert_folder(dense, sparse, config, calibration=text_of())
        return
    convert_folder(dense, sparse, config, calibration=text_of())
    model = auto_class(model_type).from_pretrained(dense, dtype="auto")
    lte.sparsify_(model, config, calibration=text_of()).save_pretrained(tmp_path / "in-memory")
    assert_same(sparse, tmp_path / "in-memory")
    assert not (sparse / WORK_FOLDER).exists()


def test_goes_on_with_the_hidden_states_that_are_kept(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse, config = tmp_path / "sparse", lte.LteConfig(expert_size=EXPERT_SIZE, grouping="contribution")
    write, run, ran = StreamedFolder.write_shard, StreamedActivity._run, []

    def fail(folder: StreamedFolder, index: int, tensors: Any) -> None:
        if index == 1:
            raise OSError("no room")
        write(folder, index, tensors)

    def note(activity: StreamedActivity, block: str) -> None:
        ran.append(block)
        run(activity, block)

    monkeypatch.setattr(StreamedActivity, "_run", note)
    with monkeypatch.context() as patched:
        patched.setattr(StreamedFolder, "write_shard", fail)
        with pytest.raises(OSError, match="no room"):
            convert_folder(dense, sparse, config, calibration=text_of())
    with pytest.raises(ValueError, match=r"output must be new .* begun with another settings"):
        convert_folder(dense, sparse, config, calibration=text_of()[:1])
    convert_folder(dense, sparse, config, calibration=text_of())
    assert ran == ["model.layers.0", "model.layers.1"]
    model = auto_class("llama").from_pretrained(dense, dtype="auto")
    lte.sparsify_(model, config, calibration=text_of()).save_pretrained(tmp_path / "in-memory")
    assert_same(sparse, tmp_path / "in-memory")


def test_another_dtype(dense: Path, tmp_path: Path) -> None:
    convert_folder(dense, tmp_path / "sparse", CONFIG, dtype=torch.float32)
    assert_same(tmp_path / "sparse", converted_in_memory(dense, CONFIG, dtype=torch.float32))


def test_names_without_the_prefix_of_the_base(tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    tiny_dense_model("gpt2").save_pretrained(dense)
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors(dense).items()}
    save_file(old, dense / "model.safetensors", {"format": "pt"})
    convert_folder(dense, tmp_path / "sparse", CONFIG)
    assert_same(tmp_path / "sparse", converted_in_memory(dense, CONFIG, "gpt2"))


def test_another_method_becomes_dense_again(tmp_path: Path) -> None:
    dense, sparse = tiny_dense_model("llama"), tmp_path / "sparse"
    tokens = torch.arange(1, 9)[None]
    wanted = logits_of(dense, tokens)
    lte.sparsify_(dense, lte.CatsConfig(), calibration=[{"input_ids": tokens}]).save_pretrained(sparse)
    densify_folder(sparse, tmp_path / "back")
    back = auto_class("llama").from_pretrained(tmp_path / "back")
    assert type(back).__name__ == "LlamaForCausalLM"
    assert torch.equal(logits_of(back, tokens), wanted)


def test_stock_transformers_reads_it_without_lte(dense: Path, tmp_path: Path) -> None:
    convert_folder(dense, tmp_path / "sparse", CONFIG)
    densify_folder(tmp_path / "sparse", tmp_path / "back", dtype=torch.float32)
    code = (
        "import sys, torch, transformers; assert 'lte' not in sys.modules\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'back')!r})\n"
        "assert 'lte' not in sys.modules and model.dtype == torch.float32\n"
        "print(type(model).__name__, model.config.model_type, model.config.hidden_act)\n"
        f"torch.save(model(torch.arange(1, 9)[None]).logits.detach(), {str(tmp_path / 'logits')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["LlamaForCausalLM", "llama", "silu"], done.stderr
    model = auto_class("llama").from_pretrained(dense, dtype=torch.float32)
    wanted = logits_of(model, torch.arange(1, 9)[None])
    # The sums over neurons have another order.
    assert torch.allclose(torch.load(tmp_path / "logits"), wanted, atol=1e-5)


def killed_while_writing(dense: Path, sparse: Path, pieces: int) -> None:
    """Converts in a child process that is killed when it has made a number of tensors."""
    child = os.fork()
    if not child:
        made, left = conversion._Layers.pieces, iter(range(pieces))

        def dies(self: Any, name: str) -> Any:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return made(self, name)

        conversion._Layers.pieces = dies  # type: ignore[method-assign]
        convert_folder(dense, sparse, CONFIG)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_goes_on_wherever_it_was_killed(dense: Path, tmp_path: Path) -> None:
    wanted, torch_threads = converted_in_memory(dense, CONFIG), torch.get_num_threads()
    torch.set_num_threads(1)
    for pieces in (0, 3, 12, 24):
        sparse = tmp_path / f"sparse-{pieces}"
        killed_while_writing(dense, sparse, pieces)
        there = {path.name: path.stat().st_mtime_ns for path in sparse.glob("*.safetensors")}
        assert len(there) == pieces // 11
        with pytest.raises((OSError, ValueError), match=r"config\.json"):
            auto_class("llama").from_pretrained(sparse)
        found = convert_folder(dense, sparse, CONFIG)
        assert (found.kept, found.layers) == (len(there), 3 - len(there))
        assert all((sparse / name).stat().st_mtime_ns == time for name, time in there.items())
        assert_same(sparse, wanted)
        assert not lte.verify(sparse)
        assert not [path.name for path in sparse.iterdir() if path.name.startswith(".")]
    torch.set_num_threads(torch_threads)


def test_a_shard_of_another_size_is_written_again(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = tmp_path / "sparse"

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(conversion.StreamedFolder, "finish", fail)
        with pytest.raises(OSError, match="No space left"):
            convert_folder(dense, sparse, CONFIG)
    with (sparse / "model-00002-of-00003.safetensors").open("r+b") as file:
        file.truncate(1000)
    assert convert_folder(dense, sparse, CONFIG).kept == 2
    assert_same(sparse, converted_in_memory(dense, CONFIG))


def test_refuses_another_conversion_in_the_same_folder(dense: Path, tmp_path: Path) -> None:
    sparse = tmp_path / "sparse"
    killed = lte.LteConfig(expert_size=EXPERT_SIZE)
    folder = conversion.StreamedFolder(sparse, {"command": "convert", "settings": killed.to_dict()}, 3)
    folder.begin()
    with pytest.raises(ValueError, match=r"output must be new or of the same conversion, got .* begun with another"):
        convert_folder(dense, sparse, CONFIG)
    shutil.rmtree(sparse)
    # A copy of the checkpoint is the same one, and one of other numbers is not, whatever the times of their files.
    copied = Path(shutil.copytree(dense, tmp_path / "copied"))
    plan = conversion._plan("convert", open_checkpoint(dense), open_checkpoint(dense).model, {})
    (copied / "model.safetensors").touch()
    assert conversion._plan("convert", open_checkpoint(copied), open_checkpoint(dense).model, {}) == plan
    weights = dict(load_file(copied / "model.safetensors"))
    weights["model.norm.weight"] = weights["model.norm.weight"] * 2
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    shutil.copystat(dense / "model.safetensors", copied / "model.safetensors")
    assert conversion._plan("convert", open_checkpoint(copied), open_checkpoint(dense).model, {}) != plan
    convert_folder(dense, sparse, CONFIG)
    with pytest.raises(ValueError, match="output must be a folder without a model, got "):
        convert_folder(dense, sparse, CONFIG)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grouping": "contribution"}, r"calibration must hold batches of text for grouping=contribution, .* got none"),
        ({"always_on": 0.1}, r"calibration must hold batches of text for always_on=0.1, .* got none; give text"),
        ({"expert_size": 7}, "expert_size must divide the number of FFN neurons"),
        ({"threshold": 0.95}, r"threshold must lie in \(0, 0.9\] for new routers"),
    ],
)
def test_refuses_settings_that_do_not_fit(changes: dict[str, Any], message: str, dense: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        convert_folder(dense, tmp_path / "sparse", lte.LteConfig(**{"expert_size": EXPERT_SIZE, **changes}))
    assert not (tmp_path / "sparse").exists()


def test_refuses_damaged_checkpoints(dense: Path, tmp_path: Path) -> None:
    numbers = tensors(dense)
    name = "model.layers.1.mlp.down_proj.weight"
    numbers[name][0, 0] = torch.nan
    save_file(numbers, dense / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"must hold finite weights, got NaN or infinity in {name}"):
        convert_folder(dense, tmp_path / "sparse", CONFIG)
    numbers.pop(name)
    save_file(numbers, dense / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"must hold all weights of the model, got 1 missing: {name}"):
        convert_folder(dense, tmp_path / "other", CONFIG)
    with (dense / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match=r"the weight file model\.safetensors is corrupt or cut short"):
        convert_folder(dense, tmp_path / "other", CONFIG)
    (dense / "model.safetensors").unlink()
    torch.save(numbers, dense / "pytorch_model.bin")
    with pytest.raises(ValueError, match="model must hold its weights as safetensors to be converted layer by layer"):
        convert_folder(dense, tmp_path / "other", CONFIG)


def test_refuses_what_cannot_be_read_tensor_by_tensor(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "rename_source_key", lambda name, *rules: (name, "experts.*"))
        with pytest.raises(ValueError, match="must hold the tensors of its model as they are to be read"):
            convert_folder(dense, tmp_path / "sparse", CONFIG)
    with monkeypatch.context() as patch:
        find = streaming._names_in_files
        patch.setattr(streaming, "_names_in_files", lambda model, files, source: {
            own: name for own, name in find(model, files, source).items() if own != "model.norm.weight"
        })  # fmt: skip
        with pytest.raises(ValueError, match=r"must hold model\.norm\.weight, got none"):
            convert_folder(dense, tmp_path / "sparse", CONFIG)
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "architectures": ["MyOwnLlama"]}))
    with pytest.raises(ValueError, match="model must be of a class of transformers to be read layer by layer, got"):
        convert_folder(dense, tmp_path / "other", CONFIG)


def test_a_file_that_keeps_a_tied_tensor_by_the_name_of_the_head(tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    model = tiny_dense_model("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(dense)
    numbers = tensors(dense)
    numbers["lm_head.weight"] = numbers.pop("model.embed_tokens.weight")
    save_file(numbers, dense / "model.safetensors", {"format": "pt"})
    convert_folder(dense, tmp_path / "sparse", CONFIG)
    assert_same(tmp_path / "sparse", converted_in_memory(dense, CONFIG))


def test_refuses_quantised_weights(dense: Path, tmp_path: Path) -> None:
    config = json.loads((dense / "config.json").read_text())
    # transformers loads this as bfloat16 where there is no GPU.
    quantised = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
    (dense / "config.json").write_text(json.dumps({**config, "quantization_config": quantised}))
    with pytest.raises(ValueError, match=r"must hold plain numbers to be read layer by layer, got .* says quantiz"):
        convert_folder(dense, tmp_path / "sparse", CONFIG)
    assert not (tmp_path / "sparse").exists()


def test_a_process_that_waited_does_not_write_over_what_another_began(tmp_path: Path) -> None:
    first, second = (StreamedFolder(tmp_path, {"command": name}, 1) for name in ("convert", "densify"))
    first.begin()
    with pytest.raises(ValueError, match=r"must be new or of the same conversion, got .* another command"):
        second.begin()
    (tmp_path / "model.safetensors").touch()
    shutil.rmtree(first.work)
    with pytest.raises(ValueError, match=r"output must be a folder without a model, got .* with model\.safetensors"):
        second.begin()


def test_refuses_numbers_that_the_dtype_does_not_hold(dense: Path, tmp_path: Path) -> None:
    numbers = tensors(dense)
    numbers["lm_head.weight"][0, 0] = 1e5
    save_file(numbers, dense / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"infinity in lm_head\.weight; take dtype float32 or bfloat16"):
        convert_folder(dense, tmp_path / "sparse", CONFIG, dtype=torch.float16)


def test_refuses_to_begin_without_room(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lte.hf.streaming.free_bytes", lambda path: 1000)
    with pytest.raises(OSError, match=r"sparse needs 0\.0 GB for what is still to be written, got 0\.0 GB free there"):
        convert_folder(dense, tmp_path / "sparse", CONFIG)
    assert not list((tmp_path / "sparse").glob("*.safetensors"))


def test_a_model_of_the_hub_is_downloaded_without_its_pickles(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(streaming, "snapshot_download", lambda name, **given: asked.append((name, given)) or str(dense))
    assert streaming._folder_of("org/name") == streaming._folder_of(str(dense)) == dense
    ((name, given),) = asked
    assert name == "org/name"
    assert {"*.safetensors", "*.json"} < set(given["allow_patterns"])
    assert not any(pattern.endswith(".bin") for pattern in given["allow_patterns"])
    monkeypatch.undo()
    with pytest.raises(OSError, match="model no name is no folder here and was not found on the hub: "):
        streaming._folder_of("no name")


def test_refuses_a_model_of_the_wrong_kind(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model must be an LTE model or one of another method, got"):
        densify_folder(dense, tmp_path / "back")
    convert_folder(dense, tmp_path / "sparse", CONFIG)
    with pytest.raises(ValueError, match=r"model must be dense, got an LTE model; call lte\.densify_"):
        convert_folder(tmp_path / "sparse", tmp_path / "again", CONFIG)


def _peak_bytes(reset: bool = False) -> int:
    """The most memory since the last reset, mapped files included."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _large_checkpoint(folder: Path, **settings: Any) -> int:
    """A llama with the same number in all weights; returns its bytes."""
    config = tiny_config("llama", **settings, dtype="float32")
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        model = auto_class("llama").from_config(config)

    def rows(shape: tuple[int, ...]) -> Iterator[Tensor]:
        yield torch.full(shape, 0.5)

    names = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    config.save_pretrained(folder)
    new = [NewTensor(n, torch.float32, shape, lambda shape=shape: rows(shape)) for n, shape in names.items()]
    return int(write_tensors(folder / "model.safetensors", new)["bytes"])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    dense, sparse = tmp_path / "dense", tmp_path / "sparse"
    size = _large_checkpoint(dense, hidden_size=1024, intermediate_size=1024, num_hidden_layers=16, head_dim=256)
    before = _peak_bytes(reset=True)
    convert_folder(dense, sparse, lte.LteConfig(expert_size=32, grouping="random"))
    densify_folder(sparse, tmp_path / "back")
    assert size > 350e6
    assert _peak_bytes() - before < 100e6


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_block_and_the_sums_of_its_neurons_are_not_in_memory_together(tmp_path: Path) -> None:
    """50 MB of a block's weights, 67 MB of sums [F, F], some of them selected, and what grouping needs."""
    _large_checkpoint(tmp_path / "dense", hidden_size=1024, intermediate_size=4096, num_hidden_layers=1, head_dim=64)
    config = lte.LteConfig(expert_size=1024, grouping="contribution", always_on=0.25)
    text = [{"input_ids": torch.arange(16)[None]}]
    before = _peak_bytes(reset=True)
    convert_folder(tmp_path / "dense", tmp_path / "sparse", config, calibration=text)
    assert _peak_bytes() - before < 130e6
