"""A checkpoint must hold the model: what is missing or does not fit is refused wherever models are loaded."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

import lte
from lte.data.tasks import get_task, load_task_model
from lte.eval.models import load_any_model, load_config
from lte.hf.checkpoints import CHECKSUM_FILE, read_checksums
from lte.hf.dense import load_dense_model, load_tokenizer
from lte.hf.loading import _MODEL_CLASSES
from lte.hf.streaming import open_checkpoint
from lte.hf.verify import loading_fault
from lte.train.adapters import train_routers_
from tests.cli.conftest import save_tiny_model
from tests.tiny_models import EXPERT_SIZE, logits_of, row_of, tiny_config, tiny_dense_model, tiny_sparse_model

UP = "model.layers.0.mlp.up_proj.weight"
EXPERTS = lte.LteConfig(expert_size=EXPERT_SIZE, grouping="random")


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    tiny_dense_model().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    tiny_sparse_model().save_pretrained(tmp_path / "sparse")
    return tmp_path / "sparse"


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def drop(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda weights: weights.pop(name)


class TestDense:
    @pytest.mark.parametrize("name", [UP, "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"])
    def test_a_missing_tensor(self, name: str, dense: Path) -> None:
        edit_weights(dense, drop(name))
        for load in (load_dense_model, load_any_model):
            with pytest.raises(
                ValueError, match=rf"{dense} must hold all weights of the model, got 1 missing: {name};"
            ):
                load(str(dense))

    def test_another_shape(self, dense: Path) -> None:
        edit_weights(dense, lambda weights: weights.update({UP: torch.zeros(63, 32)}))
        with pytest.raises(
            ValueError, match=r"1 mismatched: .*up_proj.weight of the shape \[63, 32\] where config.json"
        ):
            load_dense_model(dense)

    def test_more_layers_than_the_config_says(self, dense: Path) -> None:
        edit_config(dense, num_hidden_layers=1)
        with pytest.raises(
            ValueError, match=r"as many layers as its config.json says, got weights of more: model.layers.1"
        ):
            load_dense_model(dense)

    def test_a_number_that_is_none(self, dense: Path) -> None:
        edit_weights(dense, lambda weights: weights[UP].view(-1)[0].fill_(torch.nan))
        with pytest.raises(ValueError, match=rf"must hold finite weights, got NaN or infinity in 1: {UP}"):
            load_dense_model(dense)

    def test_integers_for_weights(self, dense: Path) -> None:
        """As some tools write them, with a scale beside them that nothing here would read."""
        more = {UP: torch.ones(64, 32, dtype=torch.int8), f"{UP}_scale": torch.ones(64)}
        edit_weights(dense, lambda weights: weights.update(more))
        for load in (load_dense_model, open_checkpoint):
            with pytest.raises(ValueError, match=rf"got 1 as integers .*quantization_config.*: {UP} in I8; take"):
                load(dense)

    @pytest.mark.parametrize("scale", ["weight_scale", "weight_scale_inv", "scale", "scale_weight", "weight_scales"])
    def test_fp8_beside_a_scale(self, scale: str, dense: Path) -> None:
        more = {UP: torch.ones(64, 32).to(torch.float8_e4m3fn)}
        edit_weights(dense, lambda weights: weights.update(more))
        load_dense_model(dense)
        edit_weights(dense, lambda weights: weights.update({UP.replace("weight", scale): torch.ones(1, 1)}))
        for load in (load_dense_model, open_checkpoint):
            with pytest.raises(ValueError, match=rf"in fp8 beside a scale, .*quantization_config.*: {UP} in F8_E4M3;"):
                load(dense)

    def test_tied_weights_need_not_be_there(self, tmp_path: Path) -> None:
        tiny_dense_model("gemma2", tie_word_embeddings=True).save_pretrained(tmp_path)
        assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
        load_dense_model(tmp_path)

    @pytest.mark.parametrize("damage", ["shard", "index entry", "index", "index of another kind", "shard cut short"])
    def test_shards(self, damage: str, tmp_path: Path) -> None:
        tiny_dense_model().save_pretrained(tmp_path, max_shard_size="20KB")
        path = tmp_path / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        shard = index["weight_map"][UP]
        named = path.name
        if damage == "shard":
            (tmp_path / shard).unlink()
            named = shard
        elif damage == "shard cut short":
            (tmp_path / shard).write_bytes((tmp_path / shard).read_bytes()[:-3])
            named = shard
        elif damage == "index entry":
            index["weight_map"][UP] = named = "model-00099-of-00099.safetensors"
            path.write_text(json.dumps(index))
        elif damage == "index":
            path.write_text(path.read_text()[:70])
        else:
            path.write_text(json.dumps({"weight_map": [1]}))
        with pytest.raises(ValueError, match=rf"{named}.*copy, download or save the folder again"):
            load_dense_model(tmp_path)

    def test_other_numbered_tensors_are_no_layers(self, dense: Path) -> None:
        """Old checkpoints keep buffers that models no longer have, and people add heads of their own."""
        more = {"model.layers.0.self_attn.old_table": torch.ones(3), "v_head.0.weight": torch.ones(3)}
        edit_weights(dense, lambda weights: weights.update(more))
        load_dense_model(dense)

    def test_a_folder_without_a_tokenizer(self, dense: Path) -> None:
        with pytest.raises(
            ValueError, match=rf"tokenizer must load, got {dense}: .*AutoTokenizer.*save_pretrained\(\"{dense}"
        ):
            load_tokenizer(dense)

    def test_an_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"must be a folder with a config\.json, got .*, which has none"):
            load_config(str(tmp_path))


class TestHeads:
    def test_a_classifier_gets_a_new_head_on_a_base_model(self, tmp_path: Path) -> None:
        save_tiny_model(tmp_path, "bert")
        tokenizer = load_tokenizer(tmp_path)
        # Neither the classifier nor the pooler is in a masked language model.
        load_task_model(tmp_path, get_task("sst2"), tokenizer)
        edit_weights(tmp_path, drop("bert.encoder.layer.1.output.dense.weight"))
        with pytest.raises(ValueError, match=r"1 missing: bert\.encoder\.layer\.1\.output\.dense\.weight"):
            load_task_model(tmp_path, get_task("sst2"), tokenizer)

    def test_a_classifier_that_lost_its_head_gets_none(self, tmp_path: Path) -> None:
        save_tiny_model(tmp_path, "bert")
        tokenizer = load_tokenizer(tmp_path)
        load_task_model(tmp_path, get_task("sst2"), tokenizer).save_pretrained(tmp_path)
        edit_weights(tmp_path, drop("classifier.weight"))
        with pytest.raises(ValueError, match=r"1 missing: classifier\.weight"):
            load_task_model(tmp_path, get_task("sst2"), tokenizer)


class TestSparse:
    def test_mismatched_sizes_may_be_ignored_in_the_head_alone(self, tmp_path: Path) -> None:
        model = row_of("llama").stock_class("LlamaForSequenceClassification")(tiny_config("llama"))
        lte.sparsify_(model, EXPERTS).save_pretrained(tmp_path)
        again = {"num_labels": 5, "ignore_mismatched_sizes": True}
        assert AutoModelForSequenceClassification.from_pretrained(tmp_path, **again).score.out_features == 5
        with pytest.raises(ValueError, match=r"mismatched: score\.weight of the shape \[2, 32\]"):
            AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
        edit_weights(tmp_path, lambda weights: weights.update({"model.layers.0.mlp.router.weight": torch.ones(3, 32)}))
        with pytest.raises(
            ValueError, match=r"1 mismatched: model\.layers\.0\.mlp\.router\.weight of the shape \[3, 32\]"
        ):
            AutoModelForSequenceClassification.from_pretrained(tmp_path, **again)

    def test_fewer_layers_on_request(self, sparse: Path) -> None:
        assert len(lte.sparse_ffns(AutoModelForCausalLM.from_pretrained(sparse, num_hidden_layers=1))) == 1
        edit_config(sparse, num_hidden_layers=1)
        with pytest.raises(ValueError, match="weights of more"):
            AutoModelForCausalLM.from_pretrained(sparse)

    def test_the_body_of_a_language_model(self, sparse: Path) -> None:
        assert len(lte.sparse_ffns(AutoModel.from_pretrained(sparse))) == 2

    def test_adapters_without_their_routers(self, sparse: Path, tokens: Tensor, tmp_path: Path) -> None:
        base = AutoModelForCausalLM.from_pretrained(sparse)
        adapted: Any = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
        train_routers_(adapted)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora" in name or "modules_to_save" in name:
                    parameter.normal_()
        adapter = tmp_path / "adapter"
        adapted.save_pretrained(adapter)
        loaded = AutoModelForCausalLM.from_pretrained(adapter).eval()
        assert torch.equal(logits_of(loaded, tokens), logits_of(adapted.eval(), tokens))
        file = adapter / "adapter_model.safetensors"
        routers = load_file(file)
        save_file({name: value for name, value in routers.items() if "router" not in name}, file)
        with pytest.raises(ValueError, match=rf"{adapter} must hold all weights of the model, got 4 missing: .*router"):
            AutoModelForCausalLM.from_pretrained(adapter)
        save_file(routers, file)
        edit_weights(sparse, drop(UP))
        with pytest.raises(ValueError, match=rf"{sparse} must hold all weights of the model, got 1 missing: {UP}"):
            AutoModelForCausalLM.from_pretrained(adapter)


class TestChecksums:
    def test_every_file_of_a_sharded_folder_but_the_card(self, tmp_path: Path) -> None:
        tiny_sparse_model().save_pretrained(tmp_path, max_shard_size="20KB")
        shards = {path.name for path in tmp_path.glob("*.safetensors")}
        assert len(shards) > 3
        wanted = {*shards, "config.json", "generation_config.json", "model.safetensors.index.json"}
        assert {*(read_checksums(tmp_path) or {})} == wanted
        assert lte.verify(tmp_path) == []

    def test_saving_again_renews_them(self, tmp_path: Path) -> None:
        tiny_sparse_model().save_pretrained(tmp_path, max_shard_size="20KB")
        tiny_sparse_model().save_pretrained(tmp_path)
        assert {*(read_checksums(tmp_path) or {})} == {"config.json", "generation_config.json", "model.safetensors"}
        assert lte.verify(tmp_path) == []

    def test_damaged_checksums_do_not_stop_a_save(self, sparse: Path) -> None:
        (sparse / CHECKSUM_FILE).write_text("{")
        assert any(CHECKSUM_FILE in found for found in lte.verify(sparse))
        tiny_sparse_model().save_pretrained(sparse)
        assert lte.verify(sparse) == []

    def test_weights_of_another_model(self, sparse: Path) -> None:
        edit_weights(sparse, lambda weights: weights[UP].mul_(2))
        AutoModelForCausalLM.from_pretrained(sparse)
        assert lte.verify(sparse) == ["model.safetensors has changed since it was written (its SHA-256 differs)"]

    def test_a_card_of_the_users_own_is_no_damage(self, sparse: Path) -> None:
        (sparse / "README.md").write_text("mine")
        assert lte.verify(sparse) == []

    def test_a_folder_of_another_tool_has_none(self, dense: Path) -> None:
        assert read_checksums(dense) is None
        assert lte.verify(dense) == []
        edit_weights(dense, drop(UP))
        assert "1 missing" in lte.verify(dense)[0]

    def test_a_folder_that_is_none(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="folder must be a model's folder on this machine, got folder=nowhere"):
            lte.verify("nowhere")
        assert "config.json" in str(loading_fault(tmp_path))


class TestVariants:
    @pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}])
    def test_a_variant_lies_beside_the_main_weights(self, shards: dict[str, str], sparse: Path, tokens: Tensor) -> None:
        main = AutoModelForCausalLM.from_pretrained(sparse).eval()
        half = AutoModelForCausalLM.from_pretrained(sparse, dtype=torch.float16).eval()
        half.save_pretrained(sparse, variant="fp16", **shards)
        assert torch.equal(
            logits_of(AutoModelForCausalLM.from_pretrained(sparse, dtype="float32"), tokens), logits_of(main, tokens)
        )
        again = AutoModelForCausalLM.from_pretrained(sparse, variant="fp16", dtype=torch.float16).eval()
        assert torch.equal(logits_of(again, tokens), logits_of(half, tokens))
        assert lte.verify(sparse) == []
        half.save_pretrained(sparse, variant="fp16")
        assert sorted(path.name for path in sparse.glob("model*")) == ["model.fp16.safetensors", "model.safetensors"]
        main.save_pretrained(sparse, max_shard_size="20KB")
        assert (sparse / "model.fp16.safetensors").exists()
        assert not (sparse / "model.safetensors").exists()
        assert lte.verify(sparse) == []


class WithBonus(transformers.LlamaForCausalLM):
    """A class of a user's own that adds a parameter."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.bonus = torch.nn.Parameter(torch.full((99,), 0.5))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + self.bonus
        return out


class TestOwnClasses:
    def test_a_subclass_saves_and_loads(self, tmp_path: Path, tokens: Tensor) -> None:
        model = lte.sparsify_(WithBonus(tiny_config("llama")), EXPERTS).eval()
        model.save_pretrained(tmp_path)
        loaded = lte.sparse_class(WithBonus).from_pretrained(tmp_path).eval()
        assert isinstance(loaded, WithBonus)
        assert torch.equal(logits_of(loaded, tokens), logits_of(model, tokens))
        assert "lte.sparse_class(WithBonus)" in (tmp_path / "README.md").read_text()
        with pytest.warns(UserWarning, match=r"saved from the class WithBonus and is loaded as LlamaForCausalLM"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(lte.densify_(loaded)) is WithBonus

    def test_stock_classes_load_without_a_warning(self, sparse: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            AutoModelForCausalLM.from_pretrained(sparse)
            AutoModel.from_pretrained(sparse)

    def test_a_class_of_no_family(self) -> None:
        with pytest.raises(ValueError, match=r"stock must be a model class of the families .*, got stock=Linear"):
            lte.sparse_class(torch.nn.Linear)
        assert lte.sparse_class(type(tiny_sparse_model())) is type(tiny_sparse_model())

    @pytest.mark.parametrize("stock", [WithBonus, transformers.LlamaForTokenClassification])
    def test_a_pickled_model_loads_where_no_model_was_made(self, stock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        model = lte.sparsify_(stock(tiny_config("llama")), EXPERTS)
        data = io.BytesIO()
        torch.save(model, data)
        monkeypatch.delitem(_MODEL_CLASSES, stock)
        data.seek(0)
        loaded = torch.load(data, weights_only=False)
        assert isinstance(loaded, stock)
        assert loaded.config.lte == EXPERTS.to_dict()
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_model_is_loaded_whole_where_deepspeed_trains_in_shards(tmp_path: Path) -> None:
    """With ZeRO-3 on, transformers would make shards of it, for which all processes must load it together."""
    from transformers.integrations import deepspeed

    class Zero3:
        def is_zero3(self) -> bool:
            return True

    config = Zero3()
    tiny_dense_model().save_pretrained(tmp_path)
    deepspeed.set_hf_deepspeed_config(config)
    try:
        assert deepspeed.is_deepspeed_zero3_enabled()
        load_dense_model(tmp_path)
        assert deepspeed.is_deepspeed_zero3_enabled()
    finally:
        deepspeed.unset_hf_deepspeed_config()
