# make quickstart: train and read the report.  make test: run the tests.  Each builds .venv by itself.
#   DEVICE=gpu   use the CUDA build of JAX          PYTHON=python3.12   choose the interpreter
#   ARGS="..."   overrides for quickstart           NAME=...            which benchmark

VENV ?= .venv
DEVICE ?= cpu
WORKERS ?= 2
RUN = $(VENV)/bin/opus-jax
PY = $(VENV)/bin/python
SHELL = /bin/bash

ifeq ($(filter cpu gpu,$(DEVICE)),)
$(error DEVICE=$(DEVICE): must be cpu or gpu)
endif
comma = ,
GPU = $(filter gpu,$(DEVICE))
BASE = $(VENV)/.base-$(DEVICE)
DEV = $(VENV)/.dev-$(DEVICE)
ALL = $(VENV)/.all-$(DEVICE)
SOURCES = pyproject.toml launch/venv.sh $(wildcard requirements/*.txt)

.DEFAULT_GOAL := help
.PHONY: help venv quickstart report test test-all lint format bench lock clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1|/' | column -t -s '|'

venv: $(DEV)  ## the virtual environment, with what tests and lint need

$(BASE): $(SOURCES)
	@launch/venv.sh $(VENV) "$(GPU)"
	@touch $@

$(DEV): $(SOURCES)
	@launch/venv.sh $(VENV) "dev$(addprefix $(comma),$(GPU))"
	@touch $@ $(BASE)

$(ALL): $(SOURCES)
	@launch/venv.sh $(VENV) "dev,ray$(addprefix $(comma),$(GPU))"
	@touch $@ $(DEV) $(BASE)

quickstart: $(BASE)  ## train on random batches, then on chosen ones, and compare (5 minutes on 2 cores)
	$(RUN) train configs/quickstart.yaml selection.method=random run.dir=runs/quickstart-random $(ARGS)
	$(RUN) train configs/quickstart.yaml $(ARGS)
	$(RUN) report runs/quickstart --compare runs/quickstart-random

report: $(BASE)  ## write the report of the quickstart again
	$(RUN) report runs/quickstart --compare runs/quickstart-random

test: $(DEV)  ## the tests, without the slow ones
	$(PY) -m pytest -n $(WORKERS) --dist=worksteal -m "not slow" --durations=10 $(ARGS)

test-all: $(ALL)  ## all the tests, Ray's included
	$(PY) -m pytest -n $(WORKERS) --dist=worksteal --durations=10 $(ARGS)

lint: $(DEV)  ## style, format and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(DEV)  ## put the source into its format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(DEV)  ## a benchmark, NAME=score_quality (ARGS=--quick for the short form)
	@test -n "$(NAME)" || { echo "make bench NAME=..., one of:" $(filter-out __init__,$(basename $(notdir $(wildcard benchmarks/*.py)))); exit 2; }
	$(PY) -m benchmarks.$(NAME) $(ARGS)

lock: $(DEV)  ## write the versions of this environment into requirements/
	@mkdir -p requirements
	@$(PY) -m pip freeze --exclude-editable | grep -E '^[A-Za-z0-9_.-]+==' \
	  > requirements/python$$($(PY) -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt

clean:  ## remove the virtual environment and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
