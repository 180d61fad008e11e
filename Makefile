# Every target sets up first what it needs; that takes Python 3.11+ and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(VENV)/.run
DEV := $(VENV)/.dev
# The one set in which torchvision and torchaudio both fit torch.
PINS := torch==2.11.0 torchvision==0.26.0 torchaudio==2.11.0 triton==3.6.0
COMPILE = $(BIN)/uv pip compile -q --universal --generate-hashes --no-header -p 3.11 pyproject.toml

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench lock

help:
	@echo "make demo    ask the shipped models about a picture and a sound"
	@echo "make setup   create $(VENV) and install what goose-mm runs on"
	@echo "make test    run the tests; installs what they need, too"
	@echo "make lint    format, lint, types, import direction"
	@echo "make bench   run benchmarks/*.py; they write to benchmarks/results"
	@echo "make lock    write requirements.lock and requirements-dev.lock anew"

setup: $(RUN)

$(RUN): requirements.lock pyproject.toml
	@echo "to download: about 3 GB, mostly torch and CUDA; in $(VENV) then: about 5.5 GB" >&2
	$(install)

$(DEV): requirements-dev.lock pyproject.toml
	@echo "to download: about 3.3 GB, mostly torch and CUDA; in $(VENV) then: about 6.2 GB" >&2
	$(install)
	@touch $(RUN)

# uv is quick; pip installs the same lock where uv cannot reach the index.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "installing the $$(grep -c '^[a-z].*==' $<) packages of $< into $(VENV) (a few minutes) ..." >&2
	@{ $(BIN)/pip install --quiet uv && \
		$(BIN)/uv pip install --quiet --python $(BIN)/python -r $< -e .; } || \
	{ $(BIN)/pip install --quiet -r $< && \
		$(BIN)/pip install --quiet --no-deps -e .; }
	@touch $@
endef

demo: $(RUN)
	@$(BIN)/goose-mm demo

test: $(DEV)
	$(BIN)/python -m pytest -n 2 -q

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports

bench: $(DEV)
	@for script in benchmarks/*.py; do echo "$$script"; $(BIN)/python "$$script" || exit 1; done

# What runs is locked within what develops, so that the tests meet the versions that people have.
lock: $(DEV)
	printf '%s\n' $(PINS) | $(COMPILE) --extra dev -c - -o requirements-dev.lock
	$(COMPILE) --extra demo -c requirements-dev.lock -o requirements.lock
