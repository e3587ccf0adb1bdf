#!/usr/bin/env bash
# Downloads a checkpoint from the Hugging Face Hub, or ModelScope, to checkpoints/REPO_ID and converts it to model.pth
# there. For gated repositories put an access token into the environment as HF_TOKEN (MODELSCOPE_API_TOKEN).
set -euo pipefail

if [ $# -ne 1 ] && { [ $# -ne 3 ] || [ "$2" != --hub ]; }; then
    echo "usage: $0 REPO_ID [--hub modelscope]      e.g. $0 Qwen/Qwen3-0.6B" >&2
    exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}
"$python" scripts/download.py "$@"
"$python" scripts/convert_hf_checkpoint.py --checkpoint_dir "checkpoints/$1"
