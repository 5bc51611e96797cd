# make demo     the whole job on real input, into demo-out/
# make test     all tests               make test-slow   those that take minutes
# make check    what CI runs: lint, types, tests
# make bench    throughput against the plain way
# make convert-pairs|convert-dclm|encode|export INPUT=... OUTPUT=... [ARGS="--workers 4"]

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=

.PHONY: setup demo test test-slow check lint types bench convert-pairs convert-dclm encode export clean

setup: $(READY)

# A current pip first: the one that comes with Python 3.11 needs minutes to resolve this.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/python examples/demo.py demo-out

test: $(READY)
	$(BIN)/python -m pytest -m "not slow" tests

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow tests

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

check: lint types test

bench: $(READY)
	$(BIN)/python -m benchmarks.run

need-in-out:
	@test -n "$(INPUT)" && test -n "$(OUTPUT)" || { echo 'pass INPUT=... OUTPUT=...' >&2; exit 2; }
.PHONY: need-in-out

convert-pairs: $(READY) need-in-out
	$(BIN)/wds-tools convert image-pairs --input $(INPUT) --output $(OUTPUT) $(ARGS)

convert-dclm: $(READY) need-in-out
	$(BIN)/wds-tools convert dclm --input $(INPUT) --output $(OUTPUT) $(ARGS)

encode: $(READY) need-in-out
	$(BIN)/wds-tools encode --input $(INPUT) --output $(OUTPUT) $(ARGS)

export: $(READY) need-in-out
	$(BIN)/wds-tools export hf --input $(INPUT) --output $(OUTPUT) $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info demo-out bench-out .mypy_cache .pytest_cache .ruff_cache .hypothesis
