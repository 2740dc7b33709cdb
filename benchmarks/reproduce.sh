#!/usr/bin/env bash
# What docs/kernels.md, docs/prefill.md, docs/serving.md and docs/company.md report from a GPU, step by step:
#
#     bash benchmarks/reproduce.sh OUTPUT STEP...
#
# Steps: tests, ffn, formats, decode, batches, few_tokens, small_ffn, many_tokens, tiles, trace, kernels, one_launch,
# sanitize, whole_step, serve_shape, which needs vLLM, and those that need HELD_OUT (articles, a JSONL file) and models in
# the environment:
#   trained: MODEL (SmolLM2-135M-Instruct as a GGUF file) and TRAIN (articles).
#   step: trains and times those models of experiments/step whose GGUF files are in SMOLLM2_135M, QWEN_CODER_0_5B and
#     QWEN_CODER_1_5B, at each of TARGETS (0.5 0.8), on TRAIN.
#   serve: trains the two Qwen models by experiments/train/qwen_coder.yaml on the texts below MIX_FOLDER, all TARGETS of
#     one at the same time, and times the folders in vLLM.
#   speculate: times prompt lookup on the 1.5B folders of serve.
#   recorded: times FFNs of 7B's widths with the routing of these folders.
# Every step writes its result files as it goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}"
output=$(realpath "$1")
shift
mkdir -p "$output"

bench() { # NAME FLAG...
  python3 -m lte bench "${@:2}" --output "$output/$1"
}

llama() { # NAME FLAG...
  bench "$1" --shape llama2-7b "${@:2}"
}

tests() { # all, or those of TEST_GROUPS by number; a run that is cut off has kept the groups that ended
  local status=0 index groups=(
    "tests/ops/test_decode.py tests/ops/test_dispatch.py tests/ops/test_quantize.py"
    "tests/ops/test_prefill.py tests/ops/test_kept_launches.py tests/cli/test_kernels.py"
    "tests/hf/test_accelerated_changes.py"
    "tests/hf/test_acceleration.py"
    "tests/hf/test_acceleration_faults.py tests/hf/test_acceleration_gpu.py"
    "tests/hf/test_accelerated_generation.py"
    "tests/bench"
    "tests/ops/test_step_gpu.py"
    "tests/hf/test_stepping.py tests/hf/test_lookup.py -k cuda"
  )
  for index in ${TEST_GROUPS:-${!groups[*]}}; do
    python3 -m pytest ${groups[index]} -n 8 --dist worksteal -ra --junit-xml="$output/gpu_tests_$index.xml" || status=$?
    python3 -m tests.summarise_run "$output/gpu_tests.json" "$output"/gpu_tests_*.xml \
      --command "bash benchmarks/reproduce.sh OUTPUT tests"
  done
  return $status
}

ffn() { llama llama2_7b_ffn --dtype bfloat16 --benchmarks ffn --batches 1,4,16; }

formats() {
  llama llama2_7b_ffn_int8 --dtype bfloat16 --weights int8 --benchmarks ffn --batches 1,4
  llama llama2_7b_ffn_float16 --dtype float16 --benchmarks ffn --batches 1
  llama llama2_7b_ffn_float32 --dtype float32 --benchmarks ffn --batches 1 --no-autotune
}

decode() { llama llama2_7b_decode --dtype bfloat16 --benchmarks decode --batches 1 --tunings "${TUNINGS:-2}"; }

batches() {
  llama llama2_7b_decode_batches --dtype bfloat16 --benchmarks decode --batches "${BATCHES:-4,16}" --sparsities 0,0.5,0.8 --tunings 0
}

few_tokens() { python3 benchmarks/prefill.py --tokens 1 2 4 8 16 24 32 48 64 --output "$output/prefill_few_tokens.json"; }

small_ffn() {
  python3 benchmarks/prefill.py --shape smollm2-135m --tokens 1 2 4 16 64 512 2048 --output "$output/prefill_smollm2.json"
  python3 benchmarks/prefill.py --shape qwen2.5-0.5b --tokens 1 2 4 8 16 64 512 2048 \
    --output "$output/prefill_qwen_0_5b.json"
}

many_tokens() { python3 benchmarks/prefill.py --tokens 128 256 512 1024 2048 8192 --output "$output/prefill.json"; }

tiles() {
  python3 benchmarks/decode_kernel.py --tokens 1 4 --budget-s 150 --tune "$output/tiles.json" \
    --output "$output/tiles_rows.json"
}

trace() { python3 benchmarks/decode_trace.py --output "$output/trace.json"; }

kernels() { python3 benchmarks/decode_step.py --settings tuned --attention sdpa --output "$output/decode_step.json"; }

trained() {
  local folder=$output/runs/lte-50-quick
  python3 -m lte train --config experiments/train/wikipedia_quick.yaml --model "$MODEL" --train "$TRAIN" \
    --validation "$HELD_OUT" --output "$folder"
  for kernels in auto int8; do
    python3 -m lte eval "$folder" --train "$HELD_OUT" --validation "$HELD_OUT" --sequence-length 1024 --dtype bfloat16 \
      --batch-size 16 --kernels $kernels --json "$output/smollm2_$kernels.json"
  done
  local text
  text=$(held_out_text)
  bench smollm2 "$folder" --text "$text" --benchmarks ffn,decode --batches 1,4 --tunings 0
  bench smollm2_int8 "$folder" --text "$text" --weights int8 --benchmarks ffn --batches 1 --no-autotune
}

one_launch() { # the kernel of a whole step by itself, at forced sparsities
  python3 benchmarks/step.py --trace --contexts 100 --output "$output/step.json"
  python3 benchmarks/step.py --contexts 4000 --sparsities 0.5 --output "$output/step_4000.json"
  python3 benchmarks/step.py --batches 4 8 --contexts 100 --sparsities 0.5 0.9 --output "$output/step_batches.json"
  python3 benchmarks/step.py --shapes llama2-7b qwen2.5-1.5b --batches 1 4 8 --contexts 100 --sparsities 0 0.5 0.8 0.9 \
    --output "$output/step_less_code.json"
  python3 benchmarks/step.py --shapes llama2-7b --bits 8 4 --contexts 100 --sparsities 0.5 0.9 --output "$output/step_bits.json"
}

sanitize() { # that kernel on small models under compute-sanitizer, once for each of two tools
  local tool
  for tool in memcheck racecheck; do
    # racecheck takes what one lane says for its whole warp at a barrier of shared memory for a race.
    compute-sanitizer --tool $tool --report-api-errors no --log-file "$output/step_$tool.txt" \
      python3 -m pytest -q -p no:xdist -p no:cacheprovider tests/ops/test_step_gpu.py -k "every_lane"
    tail -n 1 "$output/step_$tool.txt"
  done
}

whole_step() { # 7B with forced routing, and with contexts that are full but for their last tokens
  llama llama2_7b_step --dtype bfloat16 --benchmarks decode --batches 1,4,8 --sparsities 0,0.5,0.8,0.9
  local batch context
  for context in 8192 32768; do
    for batch in 1 4; do
      llama "llama2_7b_step_${context}_batch_$batch" --dtype bfloat16 --benchmarks decode --batches "$batch" \
        --sparsities 0,0.5,0.8 --tunings 0 --context-length "$context" --prompt-length "$((context - 64))"
    done
  done
}

held_out_text() { # the articles of HELD_OUT as a text; prints its path
  python3 - "$HELD_OUT" "$output/held_out.txt" <<'END'
import json, lzma, sys
with (lzma.open if sys.argv[1].endswith(".xz") else open)(sys.argv[1], "rt", encoding="utf-8") as lines:
    text = "\n\n".join(json.loads(line)["text"] for line in lines)
open(sys.argv[2], "w", encoding="utf-8").write(text)
END
  echo "$output/held_out.txt"
}

step() {
  local name file target folder text
  text=$(held_out_text)
  for name in smollm2_135m qwen_coder_0_5b qwen_coder_1_5b; do
    file=${name^^}
    file=${!file:-}
    [ -n "$file" ] || continue
    for target in ${TARGETS:-0.5 0.8}; do
      folder=$output/runs/${name}_${target#0.}0
      # A folder that is whole is only timed.
      [ -e "$folder/result.json" ] || python3 -m lte train --config "experiments/step/$name.yaml" --model "$file" \
        --train "$TRAIN" --validation "$HELD_OUT" --target-sparsity "$target" --output "$folder"
      cp "$folder/result.json" "$output/${name}_${target#0.}0_result.json"
      rm -rf "$folder"/*/checkpoint-*
      bench "${name}_${target#0.}0" "$folder" --text "$text" --dtype bfloat16 --benchmarks decode \
        --batches "${BATCHES:-1,4,8}" --tunings "${TUNINGS:-1}"
    done
  done
}

vllm_bench() { # NAME FLAG...
  # Dense and sparse by the same model runner.
  VLLM_USE_V2_MODEL_RUNNER=0 python3 benchmarks/vllm_bench.py --together --cpus 4 --work "$output/vllm" "${@:2}" \
    --output "$output/vllm_$1.json"
}

serve_shape() {
  vllm_bench 7b --shape 7b --sparsities 0.5 0.8 --batches 1 --prompt-lens 128 512 640 1024 2048 4000
  vllm_bench 7b_graphs --shape 7b --sparsities 0.5 0.8 --batches 1 --prompt-lens 1024 2048 --most-captured 2048
}

serve() {
  local name file target folder text
  text=$(held_out_text)
  for name in qwen_coder_1_5b qwen_coder_0_5b; do
    file=${name^^}
    file=${!file:-}
    [ -n "$file" ] || continue
    local folders=() runs=()
    for target in ${TARGETS:-0.5 0.8}; do
      folder=$output/served/${name}_${target#0.}0
      folders+=(--folder "$folder")
      [ -e "$folder/result.json" ] && continue
      python3 -m lte train --config experiments/train/qwen_coder.yaml --model "$file" --mix-folder "$MIX_FOLDER" \
        --target-sparsity "$target" --output "$folder" &
      runs+=($!)
    done
    local run status=0
    for run in "${runs[@]}"; do wait "$run" || status=$?; done
    [ $status = 0 ] || return $status
    for target in ${TARGETS:-0.5 0.8}; do
      cp "$output/served/${name}_${target#0.}0/result.json" "$output/${name}_${target#0.}0_served.json"
    done
    local common=("${folders[@]}" --one-baseline --text "$text")
    vllm_bench "$name" "${common[@]}" --batches 1 4 16 64 --prompt-lens 128 512 640 1024 2048 4096 8192 --gpu-time
    vllm_bench "${name}_graphs" "${common[@]}" --batches 1 --prompt-lens 640 1024 2048 --most-captured 2048 --gpu-time
    vllm_bench "${name}_serve" "${common[@]}" --batches 1 16 64 --tools serve
    vllm_bench "${name}_throughput" "${common[@]}" --batches 1 --tools throughput
  done
}

speculate() {
  local target
  for target in ${TARGETS:-0.5 0.8}; do
    python3 benchmarks/speculation.py "$output/served/qwen_coder_1_5b_${target#0.}0" --lookup 5 7 --no-modules \
      --rounds 2 --tokens 128 --output "$output/speculation_${target#0.}0.json"
  done
}

recorded() {
  local target text
  text=$(held_out_text)
  for target in ${TARGETS:-0.5 0.8}; do
    python3 benchmarks/recorded_routing.py "$output/served/qwen_coder_1_5b_${target#0.}0" --text "$text" \
      --output "$output/recorded_${target#0.}0.json"
    python3 benchmarks/recorded_routing.py "$output/served/qwen_coder_1_5b_${target#0.}0" --text "$text" \
      --apart --tokens 2 4 8 16 --output "$output/recorded_${target#0.}0_apart.json"
  done
}

for step in "$@"; do
  echo "== $step"
  $step
done
