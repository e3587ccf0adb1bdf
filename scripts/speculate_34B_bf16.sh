#!/usr/bin/env bash
# A bf16 model of 32 to 34 billion parameters with an int4 draft.
# bash scripts/speculate_34B_bf16.sh codellama/CodeLlama-34b-Python-hf codellama/CodeLlama-7b-Python-hf  # Llama
exec bash "$(dirname "${BASH_SOURCE[0]}")/speculate.sh" "" "--mode int4" \
    Qwen/Qwen3-32B Qwen/Qwen3-0.6B "$@"
