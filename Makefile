# make demo   fine-tune the embedded network on emoji, with a report      make test    the test suite
# make check  ruff and mypy       make bench   benchmarks       make venv    only the environment
SHELL := /bin/bash
ROOT := $(shell cd "$$(dirname "$$(echo '$(MAKEFILE_LIST)' | sed 's/^ *//')")" && pwd)
PYTHON ?= python3
BIN := $(ROOT)/.venv/bin

.PHONY: demo test check bench venv clean
.NOTPARALLEL:

demo: venv
	@cd "$(ROOT)" && "$(BIN)/python" -m stylegan_rooted demo --outdir "$(ROOT)/demo-run" $(ARGS)

test: venv
	@cd "$(ROOT)" && "$(BIN)/python" -m pytest $(ARGS)

check: venv
	@cd "$(ROOT)" && "$(BIN)/ruff" check . && "$(BIN)/mypy"

bench: venv
	@cd "$(ROOT)" && "$(BIN)/python" benchmarks/bench.py $(ARGS)

venv:
	@"$(ROOT)/scripts/make_venv.sh" "$(PYTHON)"

clean:
	rm -rf "$(ROOT)/.venv" "$(ROOT)/demo-run"
