"""Time and memory of `lte convert` on a checkpoint of LLaMA2-7B's shape with random weights in one file of 13.5 GB.

The checkpoint is written a tensor at a time, too, and removed at the end; both folders take 27 GB of disk.

python benchmarks/conversion.py --folder /tmp/conversion --output results/conversion.json
python benchmarks/conversion.py --folder /tmp/conversion --layers 3 --grouping contribution --tokens 2048 --output OUT
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lte.files import write_json_atomic
from lte.hf.tensor_files import PIECE_BYTES, NewTensor, write_tensors
from lte.records import environment

LLAMA2_7B = {
    **{"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
    **{"num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096},
}


def random_rows(shape: tuple[int, ...], seed: int) -> Iterator[Tensor]:
    """Gaussian rows of a weight in bf16, some at a time; ones for a norm."""
    if len(shape) == 1:
        yield torch.ones(shape)
        return
    generator = torch.Generator().manual_seed(seed)
    step = max(1, PIECE_BYTES // (4 * shape[1]))
    for start in range(0, shape[0], step):
        rows = min(step, shape[0] - start)
        yield torch.empty(rows, shape[1], dtype=torch.bfloat16).normal_(std=shape[1] ** -0.5, generator=generator)


def make_checkpoint(folder: Path, layers: int) -> None:
    """Writes config and weights."""
    config = LlamaConfig(**{**LLAMA2_7B, "num_hidden_layers": layers}, dtype="bfloat16", tie_word_embeddings=False)
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    tensors = [
        NewTensor(name, torch.bfloat16, tuple(p.shape), lambda shape=tuple(p.shape), seed=i: random_rows(shape, seed))
        for i, (name, p) in enumerate(model.state_dict().items())
    ]
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "model.safetensors", tensors)
    config.save_pretrained(folder)


def measured(command: list[str]) -> dict[str, Any]:
    """Runs a command to its end: seconds, processor seconds, and the most memory that it had, mapped files included."""
    start = time.monotonic()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    return {
        "seconds": time.monotonic() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_rss_bytes": usage.ru_maxrss * 1024,
    }


def convert_on_random_text(dense: Path, sparse: Path, expert_size: int, grouping: str, tokens: int) -> None:
    """As `lte convert` with text, which needs a tokenizer: on rows of 512 random tokens."""
    import lte
    from lte.runs.conversion import convert_folder

    rows = torch.randint(LLAMA2_7B["vocab_size"], (max(1, tokens // 512), min(tokens, 512))).split(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = lte.LteConfig(expert_size=expert_size, grouping=grouping)  # type: ignore[arg-type]
    convert_folder(dense, sparse, config, calibration=[{"input_ids": each} for each in rows], device=device)


def size(folder: Path) -> int:
    """Bytes of weights in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def layer_bytes(folder: Path) -> int:
    """Bytes of one layer of a converted folder, its router included."""
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    return (folder / index["weight_map"]["model.layers.0.mlp.gate_proj.weight"]).stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=LLAMA2_7B["num_hidden_layers"])
    parser.add_argument("--expert-size", default="32")
    parser.add_argument("--grouping", default="kmeans")
    parser.add_argument("--tokens", type=int, default=0, help="random ones, for groupings by activations")
    parser.add_argument("--convert-alone", action="store_true", help="a folder that is there; by the script itself")
    parser.add_argument("--keep", action="store_true", help="keep both folders")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    dense, sparse, back = args.folder / "dense", args.folder / "sparse", args.folder / "back"
    if args.convert_alone:
        convert_on_random_text(dense, sparse, int(args.expert_size), args.grouping, args.tokens)
        return
    make_checkpoint(dense, args.layers)
    lte = [sys.executable, "-m", "lte"]
    settings = ["--expert-size", args.expert_size, "--grouping", args.grouping]
    on_text = [sys.executable, __file__, "--folder", str(args.folder), "--tokens", str(args.tokens), "--convert-alone"]
    plain = [*lte, "convert", str(dense), "--output", str(sparse)]
    convert = measured([*(on_text if args.tokens else plain), *settings])
    shapes = {"layers": args.layers, "dense_bytes": size(dense), "sparse_bytes": size(sparse)}
    shapes["layer_bytes"] = layer_bytes(sparse)
    if not args.keep:
        shutil.rmtree(dense)
    densify = measured([*lte, "densify", str(sparse), "--output", str(back)])
    result = {
        "benchmark": "conversion", "model": "LLaMA2-7B's shape, random bf16 weights in one file", **shapes,
        "expert_size": int(args.expert_size), "grouping": args.grouping, "tokens": args.tokens,
        "threads": torch.get_num_threads(),
        "convert": convert, "densify": densify, **environment(),
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if args.output:
        write_json_atomic(args.output, result)
    if not args.keep:
        shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
