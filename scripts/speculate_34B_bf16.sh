#!/usr/bin/env bash
# A bf16 model of 32 to 34 billion parameters with an int4 draft.
# bash scripts/speculate_34B_bf16.sh codellama/CodeLlama-34b-Python-hf codellama/CodeLlama-7b-Python-hf   (the Llama pair)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}
target=${1:-Qwen/Qwen3-32B}
draft=${2:-Qwen/Qwen3-0.6B}
[ $# -lt 2 ] || shift 2
for repo in "$target" "$draft"; do
    [ -e "checkpoints/$repo/model.pth" ] || bash scripts/prepare.sh "$repo"
done
[ -e "checkpoints/$draft/model_int4.g32.pth" ] || "$python" quantize.py --checkpoint_path "checkpoints/$draft/model.pth" --mode int4
"$python" generate.py --compile --checkpoint_path "checkpoints/$target/model.pth" --draft_checkpoint_path "checkpoints/$draft/model_int4.g32.pth" \
    --speculate_k auto --prompt "def quicksort(arr):" --max_new_tokens 200 --num_samples 5 --temperature 0 "$@"
