#!/usr/bin/env bash
# All benchmarks that tell about a GPU, in pieces of at most nine minutes each, so that a machine lent for a short time
# is enough. Results: benchmarks/results/gpu/*.json, what was printed: benchmarks/results/gpu/*.log.
#
#     benchmarks/gpu.sh --smoke              every piece in short: first, to see that all of them run
#     benchmarks/gpu.sh                      every piece
#     benchmarks/gpu.sh throughput ppo g1    these alone
#
# Ends with exit code 1 if a piece failed or was cut, after the others have run. SECONDS_A_PIECE=540 is the limit.
set -uo pipefail
cd "$(dirname "$0")/.."
smoke=() pieces=()
for word in "$@"; do
  if [ "$word" = --smoke ]; then smoke=(--smoke); else pieces+=("$word"); fi
done
all=(ppo g1 onekernel throughput memory reproducibility validate sac)
[ ${#pieces[@]} -gt 0 ] || pieces=("${all[@]}")
for name in "${pieces[@]}"; do
  [[ " ${all[*]} " == *" $name "* ]] || { echo "gpu.sh: no piece $name; there are: ${all[*]}"; exit 2; }
done
limit=${SECONDS_A_PIECE:-540} out=benchmarks/results/gpu failed=()
mkdir -p "$out"
python - "${smoke[@]}" <<'PYTHON' || exit 2
import sys

import jax, mujoco.mjx
kinds = [device.device_kind for device in jax.devices()]
print(f"jax {jax.__version__} on {kinds}")
if jax.default_backend() == "cpu" and len(sys.argv) == 1:
    sys.exit("gpu.sh: no GPU; its sizes would replace the CPU's results (--smoke runs anywhere)")
PYTHON

piece() {  # NAME COMMAND...: its output to a log and the screen; killed at the limit
  local name=$1; shift
  echo "== $name: $*"
  timeout --signal INT --kill-after 20 "$limit" "$@" 2>&1 | tee "$out/$name${smoke:+_smoke}.log"
  local code=${PIPESTATUS[0]}
  [ "$code" -eq 0 ] || { failed+=("$name"); echo "== $name ended with $code"; }
}

run() {
  case $1 in
    throughput)
      for task in HalfCheetah Hopper Walker2d g1; do
        piece "throughput_$task" python benchmarks/throughput.py --tasks "$task" --name "throughput_$task" \
          --num-envs 1 128 1024 4096 8192 16384 32768 "${smoke[@]}"
      done ;;
    memory) piece memory python benchmarks/memory.py "${smoke[@]}" ;;
    onekernel)
      for task in HalfCheetah g1; do
        piece "onekernel_$task" python benchmarks/onekernel.py --tasks "$task" --name "onekernel_$task" --steps 16 \
          --num-envs 2048 4096 8192 16384 65536 "${smoke[@]}"
      done ;;
    ppo)
      piece ppo_defaults python benchmarks/time_to_return.py --env-ids HalfCheetah --seeds 1 --name ppo_defaults "${smoke[@]}"
      for task in HalfCheetah Hopper Walker2d Ant Humanoid; do
        piece "ppo_$task" python benchmarks/time_to_return.py --env-ids "$task" --seeds 1 --name "ppo_$task" \
          --total-timesteps 8000000 --flags="--num-envs 2048 --num-steps 16" "${smoke[@]}"
      done ;;
    g1) piece g1 python benchmarks/time_to_walk.py --robot g1 --name g1 \
          --flags="--num-envs 2048 --total-timesteps 45000000" "${smoke[@]}" ;;
    reproducibility) piece reproducibility python benchmarks/reproducibility.py "${smoke[@]}" ;;
    validate) piece validate python benchmarks/validate.py "${smoke[@]}" ;;
    sac) piece sac python benchmarks/sac_throughput.py "${smoke[@]}" ;;
  esac
}

for name in "${pieces[@]}"; do run "$name"; done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
