"""`lte inspect --text` and `--serve`."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lte
from lte.hf.checkpoints import CHECKSUM_FILE
from lte.methods import METHODS
from lte.methods.cats import CatsConfig
from tests.report.inspected import NASTY, PLAIN, save_sparse_model


@pytest.fixture(scope="module")
def sparse_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sparse_model(tmp_path_factory.mktemp("models") / "sparse")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(NASTY + PLAIN, encoding="utf-8")
    return path


def data_of(page: Path) -> dict[str, Any]:
    found = re.search(r'id="page-data">(.*?)</script>', page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def runs_of(page: Path) -> list[dict[str, Any]]:
    return data_of(page)["runs"]


def test_a_page_of_a_text(run: Callable[..., Any], sparse_folder: Path, text: Path, tmp_path: Path) -> None:
    page = tmp_path / "pages" / "inspect.html"
    result = run("inspect", sparse_folder, "--text", text, "--html", page, "--json", tmp_path / "model.json")
    assert result.exit_code == 0, result.output
    (shown,) = runs_of(page)
    assert "".join(shown["tokens"]) == text.read_text(encoding="utf-8")
    assert (shown["model"], shown["text"]) == ("sparse", "text.txt")
    assert f"{len(shown['ids'])} tokens, {100 * (1 - shown['sparsity']):.1f}% of the FFN neurons" in result.stdout
    assert f"Wrote {page}" in result.stdout
    assert json.loads((tmp_path / "model.json").read_text())["method"] == "lte"


def test_kernels_change_nothing(run: Callable[..., Any], sparse_folder: Path, text: Path, tmp_path: Path) -> None:
    for kernels in ("auto", "off"):
        flags = ["--text", text, "--html", tmp_path / f"{kernels}.html", "--kernels", kernels]
        assert run("inspect", sparse_folder, *flags).exit_code == 0
    assert (tmp_path / "auto.html").read_bytes() == (tmp_path / "off.html").read_bytes()


def test_two_texts(run: Callable[..., Any], sparse_folder: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(PLAIN)
    flags = ["--text", text, "--compare-text", other, "--reference", other, "--html", tmp_path / "page.html"]
    assert run("inspect", sparse_folder, *flags).exit_code == 0
    shown = runs_of(tmp_path / "page.html")
    assert [one["text"] for one in shown] == ["text.txt", "other.txt"]
    assert [one["reference"] for one in shown] == [0, 0]
    assert [one["text"] for one in data_of(tmp_path / "page.html")["references"]] == ["other.txt"]


def test_two_models(run: Callable[..., Any], sparse_folder: Path, text: Path, tmp_path: Path) -> None:
    second = save_sparse_model(tmp_path / "second", seed=1)
    page = tmp_path / "page.html"
    result = run("inspect", sparse_folder, "--text", text, "--compare-model", second, "--html", page)
    assert result.exit_code == 0, result.output
    shown = runs_of(page)
    assert [one["model"] for one in shown] == ["sparse", "second"]
    alike = save_sparse_model(tmp_path / "other" / "sparse", seed=1)
    assert run("inspect", sparse_folder, "--text", text, "--compare-model", alike, "--html", page).exit_code == 0
    assert [one["model"] for one in runs_of(page)] == [str(sparse_folder), str(alike)]
    assert shown[0]["ids"] == shown[1]["ids"]
    assert shown[0]["active"] != shown[1]["active"]


@pytest.mark.parametrize("model_type", ["bert", "t5"])
def test_other_kinds_of_models(model_type: str, run: Callable[..., Any], text: Path, tmp_path: Path) -> None:
    folder, page = save_sparse_model(tmp_path / model_type, model_type), tmp_path / "page.html"
    result = run("inspect", folder, "--text", text, "--html", page)
    assert result.exit_code == 0, result.output
    assert runs_of(page)[0]["reads_at_once"]
    assert ("The encoder reads the text" in result.stderr) == (model_type == "t5")


def test_a_text_that_is_cut_says_so(run: Callable[..., Any], sparse_folder: Path, text: Path, tmp_path: Path) -> None:
    flags = ["--text", text, "--html", tmp_path / "page.html", "--max-tokens", 7]
    result = run("inspect", sparse_folder, *flags)
    assert len(runs_of(tmp_path / "page.html")[0]["ids"]) == 7
    assert "text.txt: Only the first 7 of " in result.stderr


def test_models_with_nothing_to_inspect(
    run: Callable[..., Any], dense_folder: Path, text: Path, tmp_path: Path
) -> None:
    flags = ["--text", text, "--html", tmp_path / "page.html"]
    result = run("inspect", dense_folder, *flags)
    assert result.exit_code == 1
    assert "a dense one: every token uses all its neurons, so there is nothing to inspect" in result.stderr
    model = AutoModelForCausalLM.from_pretrained(dense_folder)
    ids = AutoTokenizer.from_pretrained(dense_folder)(PLAIN, return_tensors="pt")["input_ids"]
    lte.sparsify_(model, CatsConfig(), calibration=[{"input_ids": ids}]).save_pretrained(tmp_path / "cats")
    result = run("inspect", tmp_path / "cats", *flags)
    assert result.exit_code == 1
    assert "of the method cats, which has no routers of LTE and skips neurons whose gate" in result.stderr
    told = " ".join(run("inspect", tmp_path / "cats").stdout.split())
    for ability in METHODS["cats"].abilities():
        assert ability in told
    assert "`lte.accelerate_` has no kernels for cats: its products are computed densely and masked." in told
    assert not (tmp_path / "page.html").exists()


def test_texts_that_cannot_be_read(run: Callable[..., Any], sparse_folder: Path, text: Path, tmp_path: Path) -> None:
    binary, empty = tmp_path / "binary", tmp_path / "empty"
    binary.write_bytes(b"\xff\xfe\x00")
    empty.write_text("")
    html = ["--html", tmp_path / "page.html"]
    missing = run("inspect", sparse_folder, "--text", tmp_path / "none", *html)
    assert "--text must be an existing text file, got " in missing.stderr
    broken = run("inspect", sparse_folder, "--text", text, "--reference", binary, *html)
    assert "--reference must be UTF-8 text, got " in broken.stderr
    assert "text must hold at least one token, got ''" in run("inspect", sparse_folder, "--text", empty, *html).stderr
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--text", "t"], "--text must be given with --html FILE or --serve, got neither"),
        (["--max-tokens", "7"], "--max-tokens must be given with --html FILE or --serve, got neither"),
        (["--html", "p"], "--html must be given with --text FILE, got none"),
        (["--serve", "--html", "p"], "--html must not be given with --serve, got both"),
        (["--serve", "--compare-model", "m"], "--compare-model must not be given with --serve, got both"),
        (["--text", "t", "--html", "p", "--port", "1"], "--port must be given with --serve, got --port 1 without it"),
        (["--serve", "--compare-text", "t"], "--compare-text must be given with --text, got none"),
        (
            ["--text", "t", "--html", "p", "--compare-text", "u", "--compare-model", "m"],
            "--compare-text must be given without --compare-model, got both",
        ),
        (["--text", "t", "--html", "p", "--kernels", "of"], "did you mean off"),
        (["--text", "t", "--html", "p", "--dtype", "float23"], "did you mean float32"),
    ],
)
def test_flags_that_do_not_go_together(
    flags: list[str], message: str, run: Callable[..., Any], sparse_folder: Path
) -> None:
    result = run("inspect", sparse_folder, *flags)
    assert result.exit_code == 1
    assert message in result.stderr


@pytest.mark.slow
def test_serving_until_ctrl_c(sparse_folder: Path, text: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "lte",
        "inspect",
        str(sparse_folder),
        "--serve",
        "--port",
        "0",
        "--text",
        str(text),
    ]
    with subprocess.Popen(
        [*command, "--kernels", "off"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # What runs in the background ignores Ctrl-C, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline(), process.stdout.readline()]
            assert lines[0].startswith("text.txt on sparse: ")
            found = re.search(r"Open (http://127\.0\.0\.1:\d+/) in a browser", lines[1])
            assert found is not None, lines
            with urllib.request.urlopen(found[1], timeout=20) as page:
                assert b'"served":true' in page.read()
            process.send_signal(signal.SIGINT)
            output, problems = process.communicate(timeout=30)
        finally:
            process.kill()  # or it would be waited for
    # bitsandbytes, where it is installed, says which of its kernels a CPU lacks.
    problems = "".join(line for line in problems.splitlines() if "gemm_4bit_forward" not in line)
    assert (process.returncode, output, problems) == (0, "Stopped.\n", "")


class TestFiles:
    """Whether a folder loads, and `--verify`."""

    @pytest.fixture
    def copy(self, sparse_folder: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(sparse_folder, tmp_path / "copy"))

    def test_a_whole_folder(self, run: Callable[..., Any], copy: Path, tmp_path: Path) -> None:
        result = run("inspect", copy, "--verify", "--json", tmp_path / "model.json")
        assert result.exit_code == 0, result.output
        assert re.search(r"is as it was saved: \d+ files, by their checksums", result.stdout)
        assert json.loads((tmp_path / "model.json").read_text())["fault"] is None

    def test_a_flipped_bit(self, run: Callable[..., Any], copy: Path) -> None:
        data = bytearray((copy / "model.safetensors").read_bytes())
        data[-5] ^= 1
        (copy / "model.safetensors").write_bytes(data)
        assert run("inspect", copy).exit_code == 0
        result = run("inspect", copy, "--verify")
        assert result.exit_code == 1
        assert "must be as it was saved" in result.stderr
        assert "model.safetensors has changed since it was written" in result.stderr

    def test_a_folder_without_checksums_says_so(self, run: Callable[..., Any], copy: Path) -> None:
        (copy / CHECKSUM_FILE).unlink()
        result = run("inspect", copy, "--verify")
        assert result.exit_code == 0, result.output
        assert "It has no checksums" in " ".join(result.stdout.split())

    @pytest.mark.parametrize("fault", ["a shard is gone", "cut short", "NaN", "missing"])
    def test_a_folder_that_does_not_load_says_so(
        self, fault: str, run: Callable[..., Any], copy: Path, text: Path, tmp_path: Path
    ) -> None:
        file = copy / "model.safetensors"
        weights = load_file(file)
        router = next(name for name in weights if name.endswith("router.weight"))
        if fault == "a shard is gone":
            index = {"weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
            (copy / "model.safetensors.index.json").write_text(json.dumps(index))
            file.unlink()
        elif fault == "cut short":
            file.write_bytes(file.read_bytes()[:-1])
        elif fault == "NaN":
            save_file({**weights, router: weights[router] * float("nan")}, file, metadata={"format": "pt"})
        else:
            del weights[router]
            save_file(weights, file, metadata={"format": "pt"})
        result = run("inspect", copy, "--json", tmp_path / "model.json")
        assert result.exit_code == 1
        assert "experts per layer" in result.stdout
        assert "this describes a model that does not load" in result.stderr
        named = {"a shard is gone": "model-00001-of-00001.safetensors", "cut short": file.name}.get(fault, router)
        assert named in json.loads((tmp_path / "model.json").read_text())["fault"]
        result = run("inspect", copy, "--text", text, "--html", tmp_path / "page.html")
        assert (result.exit_code, (tmp_path / "page.html").exists()) == (1, False)
