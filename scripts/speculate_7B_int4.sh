#!/usr/bin/env bash
# An int4 model of 7 to 8 billion parameters with a small draft.
# bash scripts/speculate_7B_int4.sh meta-llama/Llama-2-7b-chat-hf TinyLlama/TinyLlama-1.1B-Chat-v1.0   (the Llama pair)
exec bash "$(dirname "${BASH_SOURCE[0]}")/speculate.sh" "--mode int4" "" \
    Qwen/Qwen3-8B Qwen/Qwen3-0.6B "$@"
