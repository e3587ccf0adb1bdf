#!/usr/bin/env bash
# An int4 model of 70 to 72 billion parameters with an int4 draft.
# bash scripts/speculate_70B_int4.sh meta-llama/Llama-2-70b-chat-hf meta-llama/Llama-2-7b-chat-hf   (the Llama pair)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}
target=${1:-Qwen/Qwen2.5-72B-Instruct}
draft=${2:-Qwen/Qwen2.5-1.5B-Instruct}
[ $# -lt 2 ] || shift 2
for repo in "$target" "$draft"; do
    [ -e "checkpoints/$repo/model.pth" ] || bash scripts/prepare.sh "$repo"
done
[ -e "checkpoints/$target/model_int4.g32.pth" ] || "$python" quantize.py --checkpoint_path "checkpoints/$target/model.pth" --mode int4 --round_to_nearest
[ -e "checkpoints/$draft/model_int4.g32.pth" ] || "$python" quantize.py --checkpoint_path "checkpoints/$draft/model.pth" --mode int4
"$python" generate.py --compile --checkpoint_path "checkpoints/$target/model_int4.g32.pth" --draft_checkpoint_path "checkpoints/$draft/model_int4.g32.pth" \
    --speculate_k auto --prompt "def quicksort(arr):" --max_new_tokens 200 --num_samples 5 --temperature 0 "$@"
