#!/usr/bin/env bash
# An int4 model of 7 to 8 billion parameters with a small draft.
# bash scripts/speculate_7B_int4.sh meta-llama/Llama-2-7b-chat-hf TinyLlama/TinyLlama-1.1B-Chat-v1.0   (the Llama pair)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}
target=${1:-Qwen/Qwen3-8B}
draft=${2:-Qwen/Qwen3-0.6B}
[ $# -lt 2 ] || shift 2
for repo in "$target" "$draft"; do
    [ -e "checkpoints/$repo/model.pth" ] || bash scripts/prepare.sh "$repo"
done
[ -e "checkpoints/$target/model_int4.g32.pth" ] || "$python" quantize.py --checkpoint_path "checkpoints/$target/model.pth" --mode int4
"$python" generate.py --compile --checkpoint_path "checkpoints/$target/model_int4.g32.pth" --draft_checkpoint_path "checkpoints/$draft/model.pth" \
    --speculate_k auto --prompt "def quicksort(arr):" --max_new_tokens 200 --num_samples 5 --temperature 0 "$@"
