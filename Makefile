# make demo   fine-tune the embedded network on emoji, with a report      make test    the test suite
# make check  ruff and mypy       make bench   benchmarks       make venv    only the environment
SHELL := /bin/bash
ROOT := $(patsubst %/,%,$(dir $(abspath $(lastword $(MAKEFILE_LIST)))))
PYTHON ?= python3
VENV := $(ROOT)/.venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := demo,fid,tensorboard,yaml,dev

.PHONY: demo test check bench venv clean
.NOTPARALLEL:

demo: venv
	cd "$(ROOT)" && "$(BIN)/python" -m stylegan_rooted demo --outdir "$(ROOT)/demo-run" $(ARGS)

test: venv
	cd "$(ROOT)" && "$(BIN)/python" -m pytest $(ARGS)

check: venv
	cd "$(ROOT)" && "$(BIN)/ruff" check . && "$(BIN)/mypy"

bench: venv
	cd "$(ROOT)" && for f in benchmarks/bench_*.py; do "$(BIN)/python" $$f $(ARGS) || exit 1; done

venv: $(STAMP)

# The stamp is written last: an interrupted installation is taken up again, a finished one is not repeated.
$(STAMP): $(ROOT)/pyproject.toml $(ROOT)/constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Error: $(PYTHON) is older than Python 3.10; name a newer one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@test -x "$(BIN)/python" || "$(PYTHON)" -m venv "$(VENV)"
	@echo "Installing into $(VENV) (the first time takes a few minutes)" >&2
	@"$(BIN)/python" -m pip install --quiet --disable-pip-version-check -c "$(ROOT)/constraints.txt" torch==2.13.0 torchvision==0.28.0 || \
		{ rc=$$?; echo "Error: pip could not install torch; see the lines above" >&2; exit $$rc; }
	@cd "$(ROOT)" && "$(BIN)/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	@touch "$(STAMP)"

clean:
	rm -rf "$(VENV)" "$(ROOT)/demo-run"
