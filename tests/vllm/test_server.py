"""A real server with SmolLM2, its routers random: what a client gets is what transformers with lte writes."""

from __future__ import annotations

import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lte
from lte.cli.demo import find_demo_model
from lte.hf.dense import load_dense_model, load_tokenizer
from tests.vllm.environment import needs_vllm, run_program
from tests.vllm.references import Reference, differences, reference
from tests.vllm.server import Server, serving

pytestmark = [pytest.mark.slow, needs_vllm]
TOKENS = 24
TEXTS = (
    "The capital of France is",
    "Photosynthesis is the process by which plants",
    "In 1969, the Apollo 11 mission landed the first humans on the Moon. The mission was commanded by",
    "def fibonacci(n):\n",
)
ACTIVE_LOGIT = 1.0
"""Mean of the random routers' logits: more than half of the experts are on."""


@torch.no_grad()
def sparse_smollm2() -> Any:
    model = load_dense_model(find_demo_model())
    lte.sparsify_(model, lte.LteConfig(grouping="random"))
    generator = torch.Generator().manual_seed(0)
    for ffn in lte.sparse_ffns(model).values():
        ffn.router.weight.copy_(torch.randn(ffn.router.weight.shape, generator=generator) / 2)
        ffn.router.bias.fill_(ACTIVE_LOGIT)
    return model.eval()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, list[Reference]]:
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    model, tokenizer = sparse_smollm2(), load_tokenizer(find_demo_model())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, tokenizer, [reference(model, tokenizer(text).input_ids, TOKENS) for text in TEXTS]


@pytest.fixture(scope="module")
def server(prepared: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = prepared[0]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    # Compiled graphs are tested on tiny models: 30 layers of them take a minute.
    with serving(str(folder), log, "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "16") as running:
        yield running


@pytest.fixture(scope="module")
def expected(prepared: Any) -> list[Reference]:
    return prepared[2]


def test_sixteen_at_once_get_what_transformers_writes(server: Server, expected: list[Reference]) -> None:
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda i: server.complete(expected[i % 4].prompt, TOKENS), range(16)))
    for start in range(0, 16, 4):
        traced = differences(expected, [answer["token_ids"] for answer in answers[start : start + 4]])
        assert len(traced) <= 1, traced


def test_one_at_a_time_get_the_same(server: Server, expected: list[Reference]) -> None:
    traced = differences(expected, [server.complete(ref.prompt, TOKENS)["token_ids"] for ref in expected])
    assert len(traced) <= 1, traced


def test_a_stream_is_the_whole_answer(server: Server, expected: list[Reference]) -> None:
    pieces = server.stream(expected[0].prompt, TOKENS)
    assert len(pieces) > 4
    assert "".join(pieces) == server.complete(expected[0].prompt, TOKENS)["text"]


def test_a_stop_sequence_ends_the_answer(server: Server, prepared: Any) -> None:
    _, tokenizer, (ref, *_) = prepared
    text = tokenizer.decode(ref.tokens)
    stop = text[len(text) // 2 :][:6]
    answer = server.complete(ref.prompt, TOKENS, stop=[stop])
    assert answer["finish_reason"] == "stop"
    assert answer["text"] == text[: text.index(stop)]


def test_logprobs_are_those_of_transformers(server: Server, prepared: Any) -> None:
    folder, _, (ref, *_) = prepared
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(torch.tensor([ref.prompt + ref.tokens])).logits[0].log_softmax(-1)
    rows = logits[len(ref.prompt) - 1 : -1]
    answer = server.complete(ref.prompt, TOKENS, logprobs=2)
    given = torch.tensor(answer["logprobs"]["token_logprobs"])
    own = rows[torch.arange(TOKENS), torch.tensor(ref.tokens)]
    assert answer["token_ids"] == ref.tokens
    assert torch.allclose(given, own, atol=1e-3), (given - own).abs().max()


def test_the_openai_client_chats(server: Server) -> None:
    (result,) = run_program("client.py", {"url": server.url, "model": server.model})
    assert result["models"] == [server.model]
    assert result["whole"] == result["streamed"]
    assert 1 <= result["tokens"] <= 8


@pytest.mark.parametrize(
    "body",
    [b"{", b'{"model": 3}', b'{"prompt": "a", "max_tokens": "many"}', b'{"prompt": [1, "a"]}', b"\xff\xfe"],
)
def test_a_malformed_body_is_refused_and_the_server_goes_on(
    server: Server, expected: list[Reference], body: bytes
) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.post("/v1/completions", body)
    assert 400 <= refused.value.code < 500
    assert len(server.complete(expected[0].prompt, 2)["token_ids"]) == 2


def test_who_leaves_harms_nobody(server: Server, expected: list[Reference]) -> None:
    with ThreadPoolExecutor(8) as pool:
        leaving = [pool.submit(server.stream, expected[i % 4].prompt, 200, 2) for i in range(4)]
        staying = [pool.submit(server.complete, ref.prompt, TOKENS) for ref in expected]
        traced = differences(expected, [answer.result()["token_ids"] for answer in staying])
        assert all(len(left.result()) == 2 for left in leaving)
    assert len(traced) <= 1, traced


def test_the_saving_is_among_the_metrics(server: Server) -> None:
    server.complete(list(range(5, 105)), 200)
    found = server.metrics()
    assert any(name.startswith("vllm:") for name in found)
    for group in ("first", "middle", "last"):
        count = found[f'lte:active_fraction_count{{layers="{group}"}}']
        active = found[f'lte:active_fraction_sum{{layers="{group}"}}'] / count
        union = found[f'lte:union_fraction_sum{{layers="{group}"}}'] / count
        assert 0.2 < active < 0.999
        assert active <= union <= 1
    assert found['lte:steps_total{path="decode"}'] > 200
    assert found['lte:steps_total{path="masked"}'] >= 1


def test_it_says_at_its_start_what_it_runs(server: Server) -> None:
    (line,) = [line for line in server.log.read_text().splitlines() if "LteLlamaForCausalLM: method lte" in line]
    assert "48 experts of 32 neurons a layer" in line
    assert "kernels numba (few tokens) and pytorch (more); skips experts for up to 16 tokens a step" in line
