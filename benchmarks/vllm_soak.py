"""A soak of a vLLM server with an LTE folder: mixed requests, many at once, some malformed and some that leave.

Run it with the Python of vLLM's environment:

    .vllm-env/bin/python benchmarks/vllm_soak.py FOLDER --requests 10000 --output results/vllm/soak.json

Whole answers, streamed or not, must be the tokens that transformers with lte writes, for prompts none of whose
decisions was close to a tie. Memory is that of all processes of the server together (PSS), sampled after every
hundredth request.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import lte
from lte.records import environment

TOKENS, PROMPTS, AT_ONCE = 12, 24, 16
KINDS = {"whole": 0.5, "streamed": 0.2, "left": 0.15, "malformed": 0.15}
SAFE_LOGITS, SAFE_SCORES = 1e-3, 1e-5
MALFORMED = (
    b"{",
    b"\xff\xfe\x00",
    b"[]",
    b'{"prompt": "a", "max_tokens": "many"}',
    b'{"prompt": [1, "a"], "max_tokens": 2}',
    b'{"prompt": [999999999], "max_tokens": 2}',
    b'{"prompt": [5], "max_tokens": -4}',
    b'{"prompt": [5], "temperature": "hot"}',
)


@torch.no_grad()
def answers(folder: str) -> list[tuple[list[int], list[int]]]:
    """Prompts of 1 to 60 tokens and their greedy continuations, without those where rounding could decide."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ffns = list(lte.sparse_ffns(model).values())
    for ffn in ffns:
        ffn.record_logits = True
    generator, found = torch.Generator().manual_seed(0), []
    for trial in range(50 * PROMPTS):
        length = 1 + trial * 7 % 60
        prompt = torch.randint(3, model.config.vocab_size, (1, length), generator=generator)
        written = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        top = model(written[:, :-1]).logits[0, length - 1 :].topk(2).values
        scores = torch.stack([ffn.logits.sigmoid() - torch.tensor(ffn.threshold_logit).sigmoid() for ffn in ffns])
        if (top[:, 0] - top[:, 1]).min() > SAFE_LOGITS and scores.abs().min() > SAFE_SCORES:
            found.append((prompt[0].tolist(), written[0, length:].tolist()))
        if len(found) == PROMPTS:
            return found
    raise SystemExit(f"{folder} has too few prompts that are far from ties: {len(found)}")


def memory_mb(leader: int) -> float:
    """PSS of all processes in the session of a process, in MB."""
    total = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getsid(int(entry.name)) == leader:
                    lines = (entry / "smaps_rollup").read_text(encoding="utf-8").splitlines()
                    total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
            except (OSError, StopIteration):
                continue
    return total / 1024


class Soak:
    """Sends the requests and counts what comes back.

    Args:
        port: of the server on this machine.
        folder: what the model is called.
        known: prompts and their continuations.
    """

    def __init__(self, port: int, folder: str, known: list[tuple[list[int], list[int]]]):
        self.port, self.folder, self.known = port, folder, known
        self.counts: Counter[str] = Counter()
        self.wrong: list[dict[str, Any]] = []

    def ask(self, number: int) -> None:
        """Sends request `number`, whose kind and prompt follow from it."""
        chance = random.Random(number)
        kind = chance.choices(list(KINDS), list(KINDS.values()))[0]
        prompt, tokens = chance.choice(self.known)
        try:
            outcome = getattr(self, f"_{kind}")(chance, prompt, tokens)
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            outcome = f"failed ({type(error).__name__})"
            self.wrong.append({"kind": kind, "error": str(error)})
        self.counts[f"{kind}: {outcome}"] += 1

    def _post(self, body: bytes) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        return connection, connection.getresponse()

    def _body(self, prompt: list[int], tokens: int, **options: Any) -> bytes:
        body = {"model": self.folder, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        return json.dumps({**body, "return_token_ids": True, **options}).encode()

    def _judge(self, kind: str, prompt: list[int], got: list[int], tokens: list[int]) -> str:
        if got == tokens:
            return "right"
        self.wrong.append({"kind": kind, "prompt": prompt, "got": got, "expected": tokens})
        return "wrong"

    def _whole(self, chance: random.Random, prompt: list[int], tokens: list[int]) -> str:
        options = chance.choice([{}, {"logprobs": 2}, {"stop": ["\x00never"]}, {"seed": 3}])
        connection, answer = self._post(self._body(prompt, TOKENS, **options))
        got = json.loads(answer.read())["choices"][0]["token_ids"]
        connection.close()
        return self._judge("whole", prompt, got, tokens)

    def _streamed(self, chance: random.Random, prompt: list[int], tokens: list[int]) -> str:
        connection, answer = self._post(self._body(prompt, TOKENS, stream=True))
        got: list[int] = []
        for line in answer:
            if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                got += json.loads(line[6:])["choices"][0].get("token_ids") or []
        connection.close()
        return self._judge("streamed", prompt, got, tokens)

    def _left(self, chance: random.Random, prompt: list[int], tokens: list[int]) -> str:
        connection, answer = self._post(self._body(prompt, 64, stream=True))
        for _ in range(chance.randrange(6)):
            answer.readline()
        connection.sock.close() if connection.sock is not None else answer.close()
        connection.close()
        return "left"

    def _malformed(self, chance: random.Random, prompt: list[int], tokens: list[int]) -> str:
        connection, answer = self._post(chance.choice(MALFORMED))
        answer.read()
        connection.close()
        if 400 <= answer.status < 500:
            return "refused"
        self.wrong.append({"kind": "malformed", "status": answer.status})
        return f"status {answer.status}"


def serve(folder: str, log: Path, max_model_len: int) -> tuple[subprocess.Popen[bytes], int]:
    """Starts a server and waits until it answers; the process, and its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--port", str(port)]
    command += ["--host", "127.0.0.1", "--enforce-eager", "--max-num-seqs", str(AT_ONCE)]
    command += ["--max-model-len", str(max_model_len), "--disable-uvicorn-access-log"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ}
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    while process.poll() is None:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return process, port
        except OSError:
            time.sleep(0.5)
    raise SystemExit(f"the server did not start, see {log}")


def soak(arguments: argparse.Namespace) -> dict[str, Any]:
    """The record of a soak."""
    known = answers(arguments.folder)
    process, port = serve(arguments.folder, arguments.log, arguments.max_model_len)
    run, samples, start = Soak(port, arguments.folder, known), [], time.monotonic()
    try:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            done = 0
            while done < arguments.requests and time.monotonic() - start < arguments.most_s:
                block = min(100, arguments.requests - done)
                list(pool.map(run.ask, range(done, done + block)))
                done += block
                samples.append(round(memory_mb(process.pid), 1))
        alive = process.poll() is None
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)
    half = samples[len(samples) // 2 :]
    import vllm

    found = environment()
    return {
        **found,
        "versions": {**found["versions"], "vllm": vllm.__version__},
        "folder": Path(arguments.folder).name,
        "requests": done,
        "seconds": round(time.monotonic() - start, 1),
        "counts": dict(sorted(run.counts.items())),
        "wrong": run.wrong[:20],
        "alive_at_the_end": alive,
        "memory_mb": samples,
        "second_half_spread": round(max(half) / min(half) - 1, 4) if half else None,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", help="an LTE folder in fp32")
    parser.add_argument("--requests", type=int, default=10000)
    parser.add_argument("--most-s", type=float, default=float("inf"), help="begin no more requests after so long")
    parser.add_argument("--max-model-len", type=int, default=192)
    parser.add_argument("--log", type=Path, default=Path("vllm_soak.log"))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    record = soak(arguments)
    text = json.dumps(record, indent=1) + "\n"
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text, encoding="utf-8")
    faults = bool(record["wrong"]) or not record["alive_at_the_end"]
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
