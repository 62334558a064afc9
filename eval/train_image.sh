#!/usr/bin/env bash
# Train Push-T from images on an accelerator and evaluate 500 episodes, unattended; continues after a kill.
#   FM_DATA=<folder of the human demonstrations> bash eval/train_image.sh [RUN] [lerobot-train flags, e.g. --steps=100000]
set -euo pipefail
cd "$(dirname "$0")/.."
run=${1:-outputs/train/pusht_image}
last=$run/checkpoints/last/pretrained_model
if [ -e "$last/train_config.json" ]; then
    uv run lerobot train --config_path="$last/train_config.json" --resume=true "${@:2}"
else
    # LeRobot refuses a folder that exists: one without a checkpoint holds nothing to continue, remove it first.
    uv run lerobot train policy=fm_ft env=pusht obs=image --policy.device=cuda --output_dir="$run" "${@:2}"
fi
again=$([ -d "$run/eval500" ] && echo --resume || true)
uv run python eval/rollout.py --episodes 500 --policy "$last" --device cuda --out "$run/eval500" $again
