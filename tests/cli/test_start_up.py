"""What the command and `import lte` load when they start."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

import lte
import lte_cli


def run_code(code: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, **settings)


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--help"], "Trains a sparse model in two stages"),
        (["--version"], lte.__version__),
        (["trian"], "Did you mean 'train'?"),
        (["--hepl"], "No such option: --hepl"),
    ],
)
def test_what_needs_no_model_starts_without_torch(arguments: list[str], answer: str) -> None:
    found = run_code(f"""
        import sys
        sys.argv = ["lte", *{arguments}]
        import lte_cli
        try:
            lte_cli.main()
        finally:
            assert not {{"lte", "torch", "transformers", "numpy"}} & set(sys.modules)
    """)
    assert answer in found.stdout + found.stderr
    assert "AssertionError" not in found.stderr


MISTAKES = [
    (["train", "--help"], 0, "--target-sparsity"),
    (["train", "--modle", "x"], 2, "No such option: --modle"),
    (["train", "--model", "./no", "--output", "out"], 1, "model must be a hub name, folder or GGUF file, got ./no"),
    (["train", "--model", "x", "--output", "out", "--seed", "-1"], 1, "seed must lie in [0, 4294967295]"),
    (
        ["train", "--model", "x", "--output", "out", "--learning-rate", "nan"],
        1,
        "learning_rate must be a finite number",
    ),
    (["train", "--model", "x", "--output", "out", "--train", "no.jsonl"], 1, "which matches nothing"),
    (["train", "--model", "x", "--output", "out", "--distill-from", "./no"], 1, "distill_from must be a hub name"),
    (["train", "--model", "x", "--output", "file/out"], 1, "output must be a place that can be written"),
    (["train", "--model", "dense", "--output", "out", "--expert-size", "7"], 1, "sizes that fit: "),
    (["train", "--model", "dense", "--output", "out", "--stages", "2"], 1, "stages=2 must start from an LTE folder"),
    (["train", "--config", "twice.yaml"], 1, "twice.yaml must be YAML, got an error in line 2, column 1: the key seed"),
    (["compare", "unknown.yaml"], 1, "got method='catz' (did you mean cats?)"),
    (["compare", "own.yaml"], 1, "got rnak (did you mean rank?)"),
    (["eval", "dense", "--json", "file/x.json"], 1, "json must be a place that can be written"),
    (["eval", "dense", "--task", "sst3"], 1, "did you mean sst2"),
    (["inspect", "dense", "--text", "file", "--html", "file/x.html"], 1, "html must be a place that can be written"),
    (["inspect", "./dens"], 1, "(did you mean dense?)"),
    (["generate", "dense", "--prompt", "a", "--temperature", "-1"], 2, "--temperature"),
    (["generate", "dense", "--prompt", "a", "--kernels", "fast"], 1, "kernels must be one of auto, off, int8"),
    (["generate", "dense", "--prompt", "\udcff"], 1, "prompt must be UTF-8 text, got prompt="),
    (["generate", "dense", "--prompt", "a", "--temperature", "inf"], 1, "temperature must be a finite number"),
    (["bench", "--shape", "lama"], 1, "did you mean llama"),
    (["report", "no.json"], 1, "paths must be existing files or folders"),
    (["demo", "--output", "file"], 1, "output must be a place that can be written"),
]


@pytest.fixture(scope="module")
def work_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the mistakes name."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "file").write_text("a text", encoding="utf-8")
    (folder / "dense").mkdir()
    (folder / "dense" / "config.json").write_text('{"model_type": "llama", "intermediate_size": 64}', encoding="utf-8")
    (folder / "twice.yaml").write_text("seed: 1\nseed: 2\n", encoding="utf-8")
    content = "model: gpt2\ndefaults: {train: pydoc-topics}\nmethods:\n  - "
    (folder / "unknown.yaml").write_text(f"{content}catz\n", encoding="utf-8")
    (folder / "own.yaml").write_text(f"{content}{{method: deja_vu, rank: 4, rnak: 4}}\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    MISTAKES,
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_mistake_is_answered_before_torch_is_loaded(
    arguments: list[str], code: int, message: str, work_folder: Path
) -> None:
    found = run_code(
        f"""
        import resource, sys
        sys.argv = ["lte", *{arguments}]
        import lte_cli
        try:
            lte_cli.main()
        finally:
            sys.stdout.flush()
            print(sorted({{"torch", "transformers", "datasets", "matplotlib", "numpy"}} & set(sys.modules)))
            used = resource.getrusage(resource.RUSAGE_SELF)
            print(used.ru_utime + used.ru_stime)
        """,
        cwd=work_folder,
        env={**os.environ, "COLUMNS": "200"},
    )
    said = " ".join((found.stdout + found.stderr).split())
    assert (found.returncode, message in said) == (code, True), said
    *_, loaded, seconds = found.stdout.splitlines()
    assert loaded == "[]" or arguments[0] == "report"
    assert "torch" not in loaded
    # It takes 0.2 to 0.5 s; a busy machine counts more.
    assert float(seconds) < 2
    assert not (work_folder / "out").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
def test_output_that_nobody_can_read_ends_nothing() -> None:
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        found = subprocess.run(
            [sys.executable, "-m", "lte", "--help"], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert (found.returncode, found.stderr) == (0, b"")


def test_a_stream_escapes_what_it_cannot_show_and_outlives_its_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w", encoding="ascii") as given:
        stream = lte_cli._forgiving(given, writer)
        print("caf\u00e9 \u2588 \ud800", file=stream, flush=True)
        assert os.read(reader, 100) == rb"caf\xe9 \u2588 \ud800" + b"\n"
        os.close(reader)
        for _ in range(3):
            print("nobody reads " * 1000, file=stream, flush=True)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_while_it_loads_is_one_line() -> None:
    code = "import os, signal, sys, threading\nsys.argv = ['lte', 'generate', 'gpt2', '--prompt', 'a']\n"
    # A process in the background may have been started with the signal ignored.
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "def press():\n    while 'torch' not in sys.modules: pass\n    os.kill(os.getpid(), signal.SIGINT)\n"
    code += "threading.Thread(target=press, daemon=True).start()\nimport lte_cli\nlte_cli.main()"
    found = run_code(code)
    assert (found.returncode, found.stderr.strip()) == (130, "Interrupted: stopped by Ctrl-C")


def test_what_a_command_loads_knows_our_models() -> None:
    found = run_code("""
        import sys
        import lte_cli
        lte_cli.is_running = True
        from lte.cli.command import quiet_transformers
        assert "torch" not in sys.modules
        quiet_transformers()
        from transformers import AutoConfig
        print(AutoConfig.for_model("lte_llama").model_type)
    """)
    assert found.stdout.strip() == "lte_llama", found.stderr


@pytest.mark.parametrize("name", lte_cli.COMMANDS)
def test_the_list_says_what_the_commands_say(name: str) -> None:
    first, _, _ = (lte_cli.load_command(name).help or "").partition("\n\n")
    assert " ".join(first.split()) == lte_cli.COMMANDS[name]


def test_import_lte_registers_the_models_and_loads_nothing_that_it_needs_later() -> None:
    heavy = ["matplotlib", "datasets", "numba", "pandas", "pyarrow", "sklearn", "peft", "rich", "typer"]
    found = run_code(f"""
        import sys
        import torch, transformers
        from transformers import AutoConfig, AutoModelForCausalLM
        before = set(sys.modules)
        import lte
        assert AutoConfig.for_model("lte_llama")
        print(*sorted(set({heavy}) & (set(sys.modules) - before)))
    """)
    assert (found.stdout.strip(), found.returncode) == ("", 0), found.stderr
