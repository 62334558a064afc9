#!/usr/bin/env bash
# Train and measure all of eval/accelerator.py on a rented accelerator, unattended, the most valuable first.
#   bash eval/accelerator.sh DATA [RUNS] [SHARDS]
# DATA is the file of `eval/accelerator.py pack`. Weights to carry home end in SHARDS, logs and speed.json in RUNS.
# Needed there: torch, torchvision, numpy, safetensors and tqdm; no LeRobot, no simulator, no network.
# After a kill the same command goes on: what is finished is passed over, what is not continues.
#   MINUTES=9   of a slice; a training is saved at its end
#   SLICES=1    end with status 75 after so many slices, where one command may not run long; default: no end
#   FLAGS="--compile --bf16"   of every training
#   PYTHON=python3
set -euo pipefail
data=$(realpath "${1:?DATA: the file of eval/accelerator.py pack}")
runs=$(realpath -m "${2:-outputs/accelerator/runs}") shards=$(realpath -m "${3:-outputs/accelerator/shards}")
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
read -ra flags <<< "${FLAGS:-}"
left=${SLICES:--1}
mkdir -p "$runs" "$shards"

program() { "${PYTHON:-python3}" eval/accelerator.py "$@"; }

# train NAME FLAGS...: slice after slice to the end, then its weights to SHARDS/NAME.
train() {
    local name=$1 status
    while [ ! -e "$shards/$name" ]; do
        [ "$left" -ne 0 ] || exit 75
        left=$((left - 1)) status=0
        echo "$(date -u +%H:%M:%S) $name"
        program train --data "$data" --out "$runs" --minutes "${MINUTES:-9}" "${@:2}" "${flags[@]}" \
            >> "$runs/$name.txt" 2>&1 || status=$?
        case $status in
            0) program home --run "$runs/$name" --out "$shards/$name" ;;
            75) ;;
            *) tail -n 5 "$runs/$name.txt" >&2; exit "$status" ;;
        esac
    done
}

# The question of the paper: the base, and eq. (6) through the two calls that it shall be run with.
train fm --method fm
train ft_reflow_2 --method ft --solver-steps 2

# What it costs; minutes, most of them of the compiler.
if [ ! -e "$runs/speed.json" ]; then
    program speed --data "$data" --json "$runs/speed.json" > "$runs/speed.txt" 2>&1
fi

# Is it the loss, or only more training? The control of equal cost; then the other method, on equal terms.
train fm_continued_for_ft_reflow_2 --method fm_continued --solver-steps 2
train ddpm --method ddpm

# More of the same question: fewer and more calls, and pairs of demonstrations instead of the base's own.
train ft_reflow_1 --method ft --solver-steps 1
train ft_nearest_2 --method ft --coupling nearest --solver-steps 2
train ft_independent_16 --method ft --coupling independent --solver-steps 16
