#!/usr/bin/env bash
# Generates with a target and a draft model; what is missing is downloaded, converted and quantized.
# speculate_*.sh call it:
#
#     speculate.sh TARGET_QUANTIZE DRAFT_QUANTIZE TARGET DRAFT [OTHER_TARGET OTHER_DRAFT] [generate.py's options]
#
# *_QUANTIZE: quantize.py's options, which make an int4 checkpoint, or "" for bf16. NPROC: ranks, by default one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}
target_quantize=$1 draft_quantize=$2 target=$3 draft=$4
shift 4
if [ $# -ge 2 ] && [[ $1 != -* ]]; then
    target=$1 draft=$2
    shift 2
fi

prepare() { # REPO QUANTIZE -> file
    file=checkpoints/$1/model.pth
    [ -e "$file" ] || bash scripts/prepare.sh "$1"
    [ -n "$2" ] || return 0
    # shellcheck disable=SC2086 # several options
    [ -e "${file%.pth}_int4.g32.pth" ] || "$python" quantize.py --checkpoint_path "$file" $2
    file=${file%.pth}_int4.g32.pth
}
prepare "$target" "$target_quantize"
target_file=$file
prepare "$draft" "$draft_quantize"
torchrun=()
[ "${NPROC:-1}" -eq 1 ] || torchrun=(-m torch.distributed.run --standalone --nproc_per_node="$NPROC")
"$python" ${torchrun[@]+"${torchrun[@]}"} generate.py --compile \
    --checkpoint_path "$target_file" --draft_checkpoint_path "$file" \
    --speculate_k auto --prompt "def quicksort(arr):" --max_new_tokens 200 --num_samples 5 --temperature 0 "$@"
