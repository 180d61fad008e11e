# `make demo` and `make test` set everything up first; that needs Python 3.11+ and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.done
# The one set in which torchvision and torchaudio both fit torch.
PINS := torch==2.11.0 torchvision==0.26.0 torchaudio==2.11.0 triton==3.6.0

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench lock

help:
	@echo "make setup   create $(VENV) and install the locked versions into it"
	@echo "make demo    ask the shipped models about a picture and a sound"
	@echo "make test    run the tests"
	@echo "make lint    format, lint, types, import direction"
	@echo "make bench   run benchmarks/*.py; they write to benchmarks/results"
	@echo "make lock    write requirements.lock anew"

setup: $(READY)

# uv is quick; pip installs the same lock where uv cannot reach the index.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "installing the locked packages into $(VENV) (several GB, a few minutes) ..." >&2
	@{ $(BIN)/pip install --quiet uv && \
		$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.lock -e .; } || \
	{ $(BIN)/pip install --quiet -r requirements.lock && \
		$(BIN)/pip install --quiet --no-deps -e .; }
	@touch $@

demo: $(READY)
	@$(BIN)/goose-mm demo

test: $(READY)
	$(BIN)/python -m pytest -n 2 -q

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports

bench: $(READY)
	@for script in benchmarks/*.py; do echo "$$script"; $(BIN)/python "$$script" || exit 1; done

lock: $(READY)
	printf '%s\n' $(PINS) | $(BIN)/uv pip compile -q --universal --generate-hashes --no-header \
		--extra demo --extra dev -p 3.11 -c - pyproject.toml -o requirements.lock
