#!/usr/bin/env bash
# Several processes of `lte compare` for each GPU and file, which share the runs: a GPU waits for its host while one process
# trains a small model. They need a core each.
#
#     bash experiments/share_gpus.sh PROCESSES FILE... -- FLAG...
#     bash experiments/share_gpus.sh 2 experiments/compare/{mrpc,stsb,sst2,cola,rte}.yaml -- --data-dir glue
#
# Takes the GPUs of CUDA_VISIBLE_DEVICES, or all. What each process says goes to runs/logs. Ends when all runs are done;
# stopped by Ctrl-C it goes on with the same command.
set -euo pipefail
processes=$1
shift
files=()
while [[ $# -gt 0 && $1 != -- ]]; do
  files+=("$1")
  shift
done
shift || true
[[ $processes =~ ^[1-9][0-9]*$ && ${#files[@]} -gt 0 ]] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }

gpus=${CUDA_VISIBLE_DEVICES:-$(nvidia-smi --query-gpu=index --format=csv,noheader | paste -sd, || true)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
mkdir -p runs/logs
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
for ((process = 1; process <= processes; process++)); do
  for gpu in ${gpus//,/ }; do
    for file in "${files[@]}"; do
      log=runs/logs/$(basename "$file" .yaml).gpu$gpu.$process.log
      CUDA_VISIBLE_DEVICES=$gpu ${PYTHON:-python3} -m lte compare "$file" "$@" >"$log" 2>&1 &
    done
  done
done
status=0
for job in $(jobs -p); do
  wait "$job" || status=1
done
exit $status
