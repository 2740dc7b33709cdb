#!/usr/bin/env bash
# Several processes of `lte compare` on each GPU, which share the runs of the files: a GPU waits for its host while one
# process trains a small model. They need a core each.
#
#     bash experiments/share_gpus.sh PROCESSES FILE... -- FLAG...
#     bash experiments/share_gpus.sh 10 experiments/compare/{mrpc,stsb,sst2,cola,rte}.yaml -- --data-dir glue
#
# Takes the GPUs of CUDA_VISIBLE_DEVICES, or all. With NVIDIA's multi-process service (nvidia-cuda-mps-control -d, before)
# their kernels run side by side; without it they take turns. What each process says goes to runs/logs. Ends when all runs
# are done; stopped by Ctrl-C it goes on with the same command.
set -euo pipefail
processes=$1
shift
files=()
while [[ $# -gt 0 && $1 != -- ]]; do
  files+=("$1")
  shift
done
shift || true
[[ $processes =~ ^[1-9][0-9]*$ && ${#files[@]} -gt 0 ]] || { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }

gpus=${CUDA_VISIBLE_DEVICES:-$(nvidia-smi --query-gpu=index --format=csv,noheader | paste -sd, || true)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
mkdir -p runs/logs
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
count=${#files[@]}
started=0
for ((process = 1; process <= processes; process++)); do
  for gpu in ${gpus//,/ }; do
    # Each begins with another file.
    first=$((started++ % count))
    order=("${files[@]:first}" "${files[@]:0:first}")
    CUDA_VISIBLE_DEVICES=$gpu ${PYTHON:-python3} -m lte compare "${order[@]}" "$@" >"runs/logs/gpu$gpu.$process.log" 2>&1 &
  done
done
status=0
for job in $(jobs -p); do
  wait "$job" || status=1
done
exit $status
