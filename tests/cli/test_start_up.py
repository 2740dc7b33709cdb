"""What the command and `import lte` load when they start."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

import lte
import lte_cli


def run_code(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)


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
