#!/usr/bin/env bash
# The whole flow on a published model: download and convert, generate, quantize to int8 and int4, generate from each.
# Options after REPO_ID go to generate.py, e.g. --device cuda.
set -euo pipefail

if [ $# -lt 1 ]; then
    echo "usage: $0 REPO_ID [generate.py's options]      e.g. $0 Qwen/Qwen3-0.6B" >&2
    exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}
repo=$1
shift
folder=checkpoints/$repo

step() {
    echo "+ $*"
    "$@"
}
generate() {
    step "$python" generate.py --compile --num_samples 2 --max_new_tokens 64 --temperature 0 \
        --prompt "The capital of France is" --checkpoint_path "$@"
}

step bash scripts/prepare.sh "$repo"
generate "$folder/model.pth" "$@"
step "$python" quantize.py --checkpoint_path "$folder/model.pth" --mode int8
generate "$folder/model_int8.pth" "$@"
step "$python" quantize.py --checkpoint_path "$folder/model.pth" --mode int4 --groupsize 32
generate "$folder/model_int4.g32.pth" "$@"
