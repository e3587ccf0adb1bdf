test:
	pytest
test-fast:
	pytest -m "not slow"
test-long:
	pytest -m long
lint:
	ruff check . && pyright
bench:
	python scripts/benchmark.py --model Qwen3-0.6B --quant none int8 int4 --peers llama.cpp --out results
.PHONY: test test-fast test-long lint bench
