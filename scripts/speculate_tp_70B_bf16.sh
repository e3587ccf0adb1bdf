#!/usr/bin/env bash
# A bf16 model of 70 to 72 billion parameters over eight devices (NPROC), with an int4 draft.
# bash scripts/speculate_tp_70B_bf16.sh meta-llama/Llama-2-70b-chat-hf meta-llama/Llama-2-7b-chat-hf   (the Llama pair)
export NPROC=${NPROC:-8}
exec bash "$(dirname "${BASH_SOURCE[0]}")/speculate.sh" "" "--mode int4" \
    Qwen/Qwen2.5-72B-Instruct Qwen/Qwen2.5-7B-Instruct "$@"
