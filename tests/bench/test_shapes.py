from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lte.bench.settings import BenchSettings, parse_counts, parse_sparsities
from lte.bench.shapes import SHAPES, random_model, shape_config
from lte.bench.text import text_ids
from lte.config import GFLOP
from lte.eval.flops import flops_per_token

CPU = torch.device("cpu")


def test_the_shapes_are_those_of_the_models() -> None:
    # The paper's Table 1, see `lte.eval.flops`.
    assert flops_per_token(shape_config("llama2-7b")) / GFLOP == pytest.approx(12.0625)
    assert flops_per_token(shape_config("smollm2-135m")) == 2 * 30 * (3 * 576 * 1536 + 576 * (9 + 3 + 3 + 9) * 64)


@pytest.mark.parametrize("tied", [False, True])
def test_a_random_model_computes_what_its_weights_say(tied: bool) -> None:
    config = LlamaConfig(**SHAPES["tiny"] | {"tie_word_embeddings": tied})
    model = random_model(config, CPU, torch.float32)
    stock = LlamaForCausalLM(config).eval()
    stock.load_state_dict(model.state_dict())
    ids = torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        found, expected = model(ids).logits, stock(ids).logits
    assert expected.isfinite().all()
    torch.testing.assert_close(found, expected)  # the rotary embeddings, which no state dict holds
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_fewer_layers_and_another_dtype() -> None:
    model = random_model(shape_config("tiny", layers=1), CPU, torch.bfloat16)
    assert len(model.model.layers) == 1
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    with pytest.raises(ValueError, match=r"layers must lie in \[1, 2\] for tiny, got layers=3"):
        shape_config("tiny", layers=3)
    with pytest.raises(ValueError, match=r"shape must be one of .* got shape='llama2-8b' .did you mean"):
        shape_config("llama2-8b")


def test_settings_are_checked() -> None:
    assert parse_sparsities("own, own@0.8,0,0.5") == ("own", "own@0.8", 0.0, 0.5)
    assert parse_counts("batches", "1,4") == (1, 4)
    for message, values in {
        "benchmarks must be one of ffn, decode, prefill, got benchmarks='fnn'": {"benchmarks": ("fnn",)},
        r"sparsities must lie in \[0, 1\], got sparsities=1.5": {"sparsities": (1.5,)},
        r"sparsities must lie in \[0, 1\], got sparsities=2": {"sparsities": ("own@2",)},
        r"batches must be at least 1, got batches=\(0,\)": {"batches": (0,)},
        r"lengths must hold at least one entry, got lengths=\(\)": {"lengths": ()},
        "repeats must be at least 1, got repeats=0": {"repeats": 0},
        "routing must be one of same, different": {"routing": "none"},
    }.items():
        with pytest.raises(ValueError, match=message):
            BenchSettings(**values)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sparsities must hold numbers, own or own@SHARE, got sparsities=half"):
        parse_sparsities("half")
    with pytest.raises(ValueError, match=r"batches must hold whole numbers, got batches=1\.5"):
        parse_counts("batches", "1.5")


def test_text_is_cut_into_pieces() -> None:
    def tokenizer(text: str, **_: object) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.arange(len(text)).unsqueeze(0)}

    assert text_ids(tokenizer, "x" * 11, 5, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(text_ids(tokenizer, "x" * 100, 5, 4)) == 5
    with pytest.raises(ValueError, match="text must hold at least 4 tokens, got 3"):
        text_ids(tokenizer, "xxx", 5, 4)
