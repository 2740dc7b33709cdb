"""The commands in experiments/paper/README.md, as bash reads them."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "experiments" / "paper"
README = (FOLDER / "README.md").read_text()
# Bash itself reads the commands; these functions print their arguments in place of running.
PRINTING = """
set -eu
lte() { printf '%s\\0' 1 "$@"; printf '\\n\\0'; }
torchrun() { [ "$1 $3 $4" = "--nproc-per-node -m lte" ]; count=$2; shift 4
  printf '%s\\0' "$count" "$@"; printf '\\n\\0'; }
pip() { :; }
"""


@dataclass(frozen=True)
class Command:
    """A command of the README: `lte` with `arguments` in `processes` processes."""

    processes: int
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.arguments[0]

    def value(self, flag: str) -> str:
        """The last value of a flag, `""` where it is not given."""
        found = [b for a, b in zip(self.arguments, self.arguments[1:], strict=False) if a == flag]
        return found[-1] if found else ""


def commands_of(text: str) -> list[Command]:
    """Every `lte` command of the bash blocks of a text, loops unrolled, in order."""
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    done = subprocess.run(["bash", "-c", PRINTING + "".join(blocks)], capture_output=True, text=True, check=True)
    parts = [part.split("\0")[:-1] for part in done.stdout.split("\n\0")[:-1]]
    return [Command(int(count), tuple(arguments)) for count, *arguments in parts]


COMMANDS = commands_of(README)
HUB = {
    "roberta-base": "FacebookAI/roberta-base",
    "roberta-large": "FacebookAI/roberta-large",
    "gpt2-medium": "openai-community/gpt2-medium",
    "llama-7b": "huggyllama/llama-7b",
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
}


def place(folder: str) -> tuple[str, str, str]:
    """Model, task and what it is, of a folder of the README: runs/llama-7b/e2e/lte."""
    runs, model, task, what = folder.split("/")
    assert runs == "runs"
    return model, task, what
