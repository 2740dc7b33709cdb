"""A server of vLLM's in a process of its own, and requests to it by plain HTTP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.vllm.environment import PYTHON, ROOT, vllm_environment


@dataclass(frozen=True)
class Server:
    """A server that answers.

    Attributes:
        url: without a slash at the end.
        model: what requests call it: the folder.
        log: where its output goes.
        pid: of its first process, which leads its process group.
    """

    url: str
    model: str
    log: Path
    pid: int

    def post(self, path: str, body: Any, timeout_s: float = 120) -> Any:
        """The JSON answer to a JSON request.

        Raises:
            urllib.error.HTTPError: for another status than 200.
        """
        data = body if isinstance(body, bytes) else json.dumps({"model": self.model, **body}).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return json.load(answer)

    def complete(self, prompt: list[int] | str, tokens: int, **options: Any) -> dict[str, Any]:
        """The greedy completion of a prompt; it does not end before `tokens` tokens unless an option says so."""
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        return self.post("/v1/completions", {**body, **options})["choices"][0]

    def stream(self, prompt: list[int], tokens: int, leave_after: int | None = None) -> list[str]:
        """The pieces of text of a streamed completion; with `leave_after` the connection is closed after so many."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
        data = json.dumps({**body, "ignore_eos": True}).encode()
        request = urllib.request.Request(self.url + "/v1/completions", data, {"Content-Type": "application/json"})
        pieces: list[str] = []
        with urllib.request.urlopen(request, timeout=120) as answer:
            for line in answer:
                if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                    pieces.append(json.loads(line[6:])["choices"][0]["text"])
                if leave_after is not None and len(pieces) >= leave_after:
                    break
        return pieces

    def get(self, path: str) -> str:
        """The text at a path."""
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return answer.read().decode()

    def metrics(self) -> dict[str, float]:
        """What Prometheus would read, by name with labels."""
        lines = [line for line in self.get("/metrics").splitlines() if line and not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


@contextmanager
def serving(folder: str, log: Path, *flags: str, start_s: float = 240) -> Iterator[Server]:
    """A server of a folder, which ends with the block.

    Raises:
        AssertionError: if it does not answer within `start_s` seconds; the message is the end of its log.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--port", str(port)]
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", *flags],
            env=vllm_environment(VLLM_CPU_KVCACHE_SPACE="1"),
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", folder, log, process.pid)
    try:
        _wait(server, process, start_s)
        yield server
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)


def _wait(server: Server, process: subprocess.Popen[bytes], start_s: float) -> None:
    end = time.monotonic() + start_s
    while time.monotonic() < end and process.poll() is None:
        try:
            server.get("/health")
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
        else:
            return
    raise AssertionError(
        f"the server must answer within {start_s} s, got:\n{server.log.read_text(encoding='utf-8')[-3000:]}"
    )
