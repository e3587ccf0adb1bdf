#!/usr/bin/env bash
# An int4 model of 70 to 72 billion parameters with an int4 draft.
# bash scripts/speculate_70B_int4.sh meta-llama/Llama-2-70b-chat-hf meta-llama/Llama-2-7b-chat-hf   (the Llama pair)
exec bash "$(dirname "${BASH_SOURCE[0]}")/speculate.sh" "--mode int4 --round_to_nearest" "--mode int4" \
    Qwen/Qwen2.5-72B-Instruct Qwen/Qwen2.5-1.5B-Instruct "$@"
