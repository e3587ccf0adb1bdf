#!/usr/bin/env bash
# A bf16 model of 70 to 72 billion parameters over eight devices (NPROC), with an int4 draft.
# bash scripts/speculate_tp_70B_bf16.sh meta-llama/Llama-2-70b-chat-hf meta-llama/Llama-2-7b-chat-hf   (the Llama pair)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}
target=${1:-Qwen/Qwen2.5-72B-Instruct}
draft=${2:-Qwen/Qwen2.5-7B-Instruct}
[ $# -lt 2 ] || shift 2
for repo in "$target" "$draft"; do
    [ -e "checkpoints/$repo/model.pth" ] || bash scripts/prepare.sh "$repo"
done
[ -e "checkpoints/$draft/model_int4.g32.pth" ] || "$python" quantize.py --checkpoint_path "checkpoints/$draft/model.pth" --mode int4
"$python" -m torch.distributed.run --standalone --nproc_per_node="${NPROC:-8}" generate.py --compile --checkpoint_path "checkpoints/$target/model.pth" --draft_checkpoint_path "checkpoints/$draft/model_int4.g32.pth" \
    --speculate_k auto --prompt "def quicksort(arr):" --max_new_tokens 200 --num_samples 5 --temperature 0 "$@"
