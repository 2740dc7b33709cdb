"""Every family through everything: convert, train, save, reload, generate, copy, cast, and back to dense."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig

import lte
from lte.hf.families import FAMILIES, family_of
from tests.tiny_models import (
    EXPERT_SIZE,
    MODEL_TYPES,
    NEURONS,
    PAD,
    auto_class,
    logits_of,
    num_ffns,
    row_of,
    tiny_config,
    tiny_dense_model,
    tiny_sparse_model,
)


def load(folder: Path, **kwargs: Any) -> Any:
    """What the Auto class of the family's own head makes of a folder."""
    return auto_class(family_of(AutoConfig.from_pretrained(folder)).model_type).from_pretrained(folder, **kwargs)


def reload(model: Any, folder: Path, **kwargs: Any) -> Any:
    model.save_pretrained(folder)
    return load(folder, **kwargs)


def test_convert_keeps_the_function(model_type: str, tokens: Tensor, relative_rms) -> None:
    model = tiny_dense_model(model_type)
    dense, names = logits_of(model, tokens), set(dict(model.named_parameters()))
    config = lte.LteConfig(expert_size=EXPERT_SIZE, grouping="random")
    assert lte.sparsify_(model, config) is model
    assert relative_rms(logits_of(model, tokens), dense) <= 1e-5
    ffns = lte.sparse_ffns(model)
    assert len(ffns) == num_ffns(model_type)
    assert all(ffn.num_experts == NEURONS // EXPERT_SIZE and ffn.mode == "hard" for ffn in ffns.values())
    added = set(dict(model.named_parameters())) - names
    assert added == {f"{name}.router.{part}" for name in ffns for part in ("weight", "bias")}
    assert names <= set(dict(model.named_parameters()))


def test_convert_permutes(model_type: str) -> None:
    model = tiny_dense_model(model_type)
    layout = row_of(model_type).layout
    before = copy.deepcopy(model.state_dict())
    lte.sparsify_(model, lte.LteConfig(expert_size=EXPERT_SIZE, grouping="random"))
    down = [name for name in before if name.endswith(f".{layout.down}.weight") and before[name].numel() == NEURONS * 32]
    assert len(down) == num_ffns(model_type)
    for name in down:
        now, then = (state[name].T if layout.transposed else state[name] for state in (model.state_dict(), before))
        assert not torch.equal(now, then)
        assert torch.equal(now.sort(-1).values, then.sort(-1).values)


def test_routed_model_is_really_sparse(model_type: str, tokens: Tensor) -> None:
    dense = logits_of(tiny_sparse_model(model_type, routed=False), tokens)
    model = tiny_sparse_model(model_type)
    for ffn in lte.sparse_ffns(model).values():
        ffn.record_logits = True
    routed = logits_of(model, tokens)
    fractions = [(ffn.logits > 0).float().mean().item() for ffn in lte.sparse_ffns(model).values()]
    assert all(0.2 < fraction < 0.8 for fraction in fractions)
    assert not torch.allclose(routed, dense, atol=1e-2)


def test_save_and_reload_is_bit_equal(model_type: str, tokens: Tensor, tmp_path: Path) -> None:
    model = tiny_sparse_model(model_type)
    loaded, info = reload(model, tmp_path / "model", output_loading_info=True)
    assert type(loaded) is type(model)
    assert not any(info.values()), info
    assert torch.equal(logits_of(loaded.eval(), tokens), logits_of(model, tokens))
    assert loaded.lte_config == lte.LteConfig(expert_size=EXPERT_SIZE, grouping="random")
    assert loaded.config.lte == model.config.lte


def test_saved_names_are_the_family_s_own(model_type: str, tmp_path: Path) -> None:
    stock = tiny_dense_model(model_type)
    stock.save_pretrained(tmp_path / "stock")
    tiny_sparse_model(model_type).save_pretrained(tmp_path / "model")
    with safe_open(tmp_path / "stock" / "model.safetensors", "pt") as file:
        stock_shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    routers = {key for key in shapes if ".router." in key}
    assert len(routers) == 2 * num_ffns(model_type)
    assert {key: shape for key, shape in shapes.items() if key not in routers} == stock_shapes


def test_saved_config_differs_only_where_it_must(model_type: str) -> None:
    stock = tiny_dense_model(model_type).config
    model = tiny_sparse_model(model_type)
    saved, before = model.config.to_dict(), stock.to_dict()
    changed = {key for key in saved if saved[key] != before.get(key)}
    field = row_of(model_type).activation_field
    assert changed <= {"model_type", "lte", field, "architectures"}
    assert getattr(model.config, field) == getattr(stock, field)
    assert "an LTE model" in saved[field]
    again = type(model.config)(**saved)
    assert getattr(again, field) == getattr(stock, field), "reading the config must take the guard out"
    assert again.to_dict()[field] == saved[field], "a second round must not add a second guard"


def test_sharded_save_reloads(model_type: str, tokens: Tensor, tmp_path: Path) -> None:
    model = tiny_sparse_model(model_type)
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 2
    loaded = load(tmp_path / "model").eval()
    assert torch.equal(logits_of(loaded, tokens), logits_of(model, tokens))
    # One file over many: the shards must go.
    model.save_pretrained(tmp_path / "model")
    assert [path.name for path in (tmp_path / "model").glob("model*")] == ["model.safetensors"]
    loaded = load(tmp_path / "model").eval()
    assert torch.equal(logits_of(loaded, tokens), logits_of(model, tokens))


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_map(model_type: str, device_map: str, tokens: Tensor, tmp_path: Path) -> None:
    model = tiny_sparse_model(model_type)
    loaded = reload(model, tmp_path / "model", device_map=device_map).eval()
    tokens = tokens.to(loaded.device)
    out = logits_of(loaded, tokens).cpu()
    assert torch.allclose(out, logits_of(model, tokens.cpu()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_load_keeps_the_routers_in_fp32(
    model_type: str, dtype: torch.dtype, tokens: Tensor, tmp_path: Path
) -> None:
    loaded = reload(tiny_sparse_model(model_type), tmp_path / "model", dtype=dtype).eval()
    dtypes = {".router." in name: set() for name, _ in loaded.named_parameters()}
    # T5 keeps its down projections in fp32 in a model of float16.
    wide = ".wo." if row_of(model_type).model_type == "t5" and dtype == torch.float16 else None
    for name, parameter in loaded.named_parameters():
        if wide is not None and wide in name:
            assert parameter.dtype == torch.float32
            continue
        dtypes[".router." in name].add(parameter.dtype)
    assert dtypes == {True: {torch.float32}, False: {dtype}}
    assert logits_of(loaded, tokens).isfinite().all()
    # And once more: saved in low precision, loaded as saved.
    again = reload(loaded, tmp_path / "again").eval()
    assert again.dtype == dtype
    assert torch.equal(logits_of(again, tokens), logits_of(loaded, tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cast_model_runs_with_fp32_logits(model_type: str, dtype: torch.dtype, tokens: Tensor) -> None:
    model = tiny_sparse_model(model_type)
    model = model.half() if dtype == torch.float16 else model.to(dtype)
    ffn = next(iter(lte.sparse_ffns(model).values()))
    ffn.record_logits = True
    out = logits_of(model, tokens)
    assert out.dtype == dtype
    assert out.isfinite().all()
    assert ffn.logits is not None
    assert ffn.logits.dtype == torch.float32


def test_tied_embeddings_stay_tied(model_type: str, tokens: Tensor, tmp_path: Path) -> None:
    model = tiny_sparse_model(model_type, tie_word_embeddings=True)
    loaded = reload(model, tmp_path / "model").eval()
    for each in (model, loaded):
        assert each.get_output_embeddings().weight is each.get_input_embeddings().weight
    assert torch.equal(logits_of(loaded, tokens), logits_of(model, tokens))


def test_copies(model_type: str, tokens: Tensor) -> None:
    model = tiny_sparse_model(model_type)
    expected = logits_of(model, tokens)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        assert torch.equal(logits_of(twin, tokens), expected)
        with torch.no_grad():
            next(iter(lte.sparse_ffns(twin).values())).router.bias.fill_(-9)
        assert not torch.equal(logits_of(twin, tokens), expected)
    assert torch.equal(logits_of(model, tokens), expected)


def test_densify_gives_the_stock_class(model_type: str, tokens: Tensor, relative_rms, tmp_path: Path) -> None:
    family = row_of(model_type)
    dense = logits_of(tiny_dense_model(model_type), tokens)
    model = tiny_sparse_model(model_type)
    assert lte.densify_(model) is model
    assert type(model) is family.stock_class(next(iter(family.models.values())))
    assert type(model.config) is family.stock_class(family.config_class)
    assert not hasattr(model.config, "lte")
    assert set(model.state_dict()) == set(tiny_dense_model(model_type).state_dict())
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert relative_rms(logits_of(model, tokens), dense) <= 1e-5
    model.save_pretrained(tmp_path / "dense")
    loaded = load(tmp_path / "dense").eval()
    assert type(loaded) is type(model)
    assert torch.equal(logits_of(loaded, tokens), logits_of(model, tokens))
    lte.sparsify_(model, lte.LteConfig(expert_size=EXPERT_SIZE, grouping="random"))
    assert lte.sparse_ffns(model)


@pytest.mark.parametrize("mode", ["soft", "straight_through", "hard"])
def test_three_steps_change_what_is_trainable_and_nothing_else(model_type: str, mode: Any, tokens: Tensor) -> None:
    model = tiny_sparse_model(model_type).train()
    for ffn in lte.sparse_ffns(model).values():
        ffn.set_mode(mode)
        ffn.router.requires_grad_(mode != "hard")
    model.get_input_embeddings().requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    for _ in range(3):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    parameters = dict(model.named_parameters())
    changed = {name for name, value in before.items() if not torch.equal(parameters[name], value)}
    assert changed == {name for name, parameter in parameters.items() if parameter.requires_grad}
    assert any(".router." in name for name in changed) == (mode != "hard")


def test_left_padded_rows_generate_what_they_generate_alone(causal_type: str, tokens: Tensor) -> None:
    model = tiny_sparse_model(causal_type)
    short, settings = tokens[1:, :4], {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    alone = model.generate(short, attention_mask=torch.ones_like(short), **settings)
    padded = torch.cat([torch.full((1, 3), PAD), short], dim=1)
    batch = torch.cat([tokens[:1], padded])
    out = model.generate(batch, attention_mask=(batch != PAD).long(), **settings)
    assert torch.equal(out[1, 3:], alone[0])
    first = model.generate(tokens[:1], attention_mask=torch.ones_like(tokens[:1]), **settings)
    assert torch.equal(out[0], first[0])


def test_cached_decoding_matches_one_pass(causal_type: str, tokens: Tensor, relative_rms) -> None:
    model = tiny_sparse_model(causal_type)
    with torch.no_grad():
        start = model(tokens[:, :-1], use_cache=True)
        step = model(tokens[:, -1:], past_key_values=start.past_key_values)
    assert relative_rms(step.logits[:, 0], logits_of(model, tokens)[:, -1]) <= 1e-5


def test_low_rank_router_round_trip(model_type: str, tokens: Tensor, relative_rms, tmp_path: Path) -> None:
    model = tiny_dense_model(model_type)
    dense = logits_of(model, tokens)
    lte.sparsify_(model, lte.LteConfig(expert_size=EXPERT_SIZE, grouping="contiguous", router_rank=4))
    assert relative_rms(logits_of(model, tokens), dense) <= 1e-5
    ffns = list(lte.sparse_ffns(model).values())
    assert not torch.equal(ffns[0].router.down, ffns[1].router.down), "layers must not share a start"
    for ffn in ffns:
        nn.init.normal_(ffn.router.weight)
    loaded = reload(model, tmp_path / "model").eval()
    assert torch.equal(logits_of(loaded, tokens), logits_of(model, tokens))


def test_family_of_sparse_and_stock_configs(model_type: str) -> None:
    family = row_of(model_type)
    assert family_of(tiny_dense_model(model_type).config) is family
    assert family_of(tiny_sparse_model(model_type).config) is family


def head_cases() -> list[tuple[str, str]]:
    return [
        (model_type, head) for model_type in MODEL_TYPES for head in row_of(model_type).heads if model_type in FAMILIES
    ]


@pytest.mark.parametrize(("model_type", "head"), head_cases())
def test_every_head_reloads_through_its_auto_class(model_type: str, head: str, tmp_path: Path) -> None:
    row = row_of(model_type)
    assert getattr(transformers, head)._model_mapping[row.stock_class(row.config_class)].__name__ == row.heads[head]
    model = row.stock_class(row.heads[head])(tiny_config(model_type))
    lte.sparsify_(model, lte.LteConfig(expert_size=EXPERT_SIZE, grouping="random"))
    model.save_pretrained(tmp_path)
    loaded = getattr(transformers, head).from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
