# make demo     the whole job on real input, into demo-out/ (installs what it needs; TORCH_INDEX=URL for another build of torch)
# make train-demo   train from an S3 server on this machine: killed, resumed, audited; into train-demo-out/
# make train-proof  the same losses on 1, 2, 3 and 4 ranks and on 4, 3, 4; into train-proof-out/ and docs/train-proof.svg
# make test     all quick tests, two at a time (JOBS=N)      make test-slow   those of more than 3 s each, properties on more examples
# make check    lint, types, quick tests: what CI runs, with two minutes of test-chaos behind it
# make test-chaos   kills, flipped bits, a broken network, hostile documents, at random (10 minutes; SECONDS=120, SEED=N, CASE=kills:17)
# make bench    throughput against the plain way
# make bench-decode   images decoded by a transform, beside webdataset's and Energon's decode (1 minute)
# make bench-encode   encoding against one image at a time (4 minutes, on a CPU)
# make bench-gpu      what encoding reaches on a GPU (8 minutes; nothing is installed: PYTHON=... has torch and the rest)
# make docs     the documentation as a site, into site/      make pictures   draw the pictures of README and docs again (needs Chromium)
# make dist     source distribution and wheel, into dist/
# make bench-loader   the loader against its peers (15 minutes; bench-peers builds their environment, 7 GB, when it is missing)
# make bench-mixing   how well orders mix a dataset sorted by label, beside others' (10 minutes; no data is written)
# make bench-sequences   token rows against the straightforward collator (6 minutes)
# make bench-select      fields, choices and copies of samples; asking a run (5 minutes)
# make convert-pairs|convert-dclm|encode|export INPUT=... OUTPUT=... [ARGS="--workers 4"]

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_READY := $(VENV)/.demo-ready
READY := $(VENV)/.ready
TRAINERS := .venv-trainers
PEERS := .venv-peers
PEERS_READY := $(PEERS)/.ready
JOBS ?= 2
SECONDS ?= 600
SEED ?=
CASE ?=
ARGS ?=
# A package index with another build of torch, such as its CPU build: a twentieth of the size.
TORCH_INDEX ?=
PIP_INSTALL = $(BIN)/python -m pip install --quiet --constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: setup demo train-demo train-proof test test-slow test-chaos check lint types docs pictures dist bench bench-decode bench-encode bench-gpu bench-loader bench-mixing bench-sequences bench-select bench-peers convert-pairs convert-dclm encode export clean

setup: $(READY)

# A current pip first: the one that comes with Python 3.11 needs minutes to resolve this.
$(DEMO_READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(PIP_INSTALL) --editable '.[demo]'
	touch $@

# What tests, lint, training demo and documentation need beside that.
$(READY): $(DEMO_READY)
	$(PIP_INSTALL) --editable '.[dev]'
	touch $@

demo: $(DEMO_READY)
	$(BIN)/python examples/demo.py demo-out

train-demo: $(READY)
	$(BIN)/python examples/train_demo.py train-demo-out

train-proof: $(READY)
	$(BIN)/python examples/train_proof.py train-proof-out

test: $(READY)
	$(BIN)/python -m pytest -m "not slow" --numprocesses $(JOBS) --dist loadfile tests

test-slow: $(READY) $(TRAINERS)/.ready
	$(BIN)/python -m pytest -m "slow or hypothesis" --hypothesis-profile explore --numprocesses $(JOBS) --dist loadfile tests

test-chaos: $(READY)
	PYTHONPATH=tests $(BIN)/python -m chaos --seconds $(SECONDS) $(if $(SEED),--seed $(SEED)) $(if $(CASE),--case $(CASE))

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

check: lint types test

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --clean

pictures: $(READY)
	$(BIN)/python docs/diagrams.py
	$(BIN)/python docs/pictures.py

dist: $(READY)
	rm -rf build dist
	$(BIN)/python -m build --installer pip --outdir dist

bench: $(READY)
	$(BIN)/python -m benchmarks.run

bench-decode: $(READY)
	$(BIN)/python -m benchmarks.decode $(ARGS)

bench-encode: $(READY)
	$(BIN)/python -m benchmarks.encode $(ARGS)

# A machine with a GPU has its own torch, and often no network: PYTHON has what it takes (docs/benchmarks.md).
bench-gpu:
	$(PYTHON) -m benchmarks.gpu $(ARGS)

bench-loader: $(READY) $(PEERS_READY)
	$(BIN)/python -m benchmarks.loader --peers $(PEERS)/bin/python $(ARGS)

bench-mixing: $(READY)
	$(BIN)/python -m benchmarks.mixing $(ARGS)

bench-sequences: $(READY)
	$(BIN)/python -m benchmarks.sequences $(ARGS)

bench-select: $(READY)
	$(BIN)/python -m benchmarks.select $(ARGS)
	$(BIN)/python -m benchmarks.ask

bench-peers: $(PEERS_READY)

# torchtitan and Megatron-Core with what they import, in a folder of their own.
$(TRAINERS)/.ready: tests/trainers.txt $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(TRAINERS) --requirement tests/trainers.txt
	touch $@

# All at once, so that one numpy fits all (and pins for what pip would search through years of versions for); if that fails, one by one, and the benchmark reports those that are missing.
$(PEERS_READY): benchmarks/peers/requirements.txt constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --upgrade pip
	$(PEERS)/bin/python -m pip install --quiet --constraint constraints.txt --requirement benchmarks/peers/requirements.txt || \
	while read -r peer; do $(PEERS)/bin/python -m pip install --quiet --constraint constraints.txt "$$peer" || \
	echo "$$peer: not installed" >&2; done < benchmarks/peers/requirements.txt
	touch $@

need-in-out:
	@test -n "$(INPUT)" && test -n "$(OUTPUT)" || { echo 'pass INPUT=... OUTPUT=...' >&2; exit 2; }
.PHONY: need-in-out

convert-pairs: $(DEMO_READY) need-in-out
	$(BIN)/wds-tools convert pairs --input $(INPUT) --output $(OUTPUT) $(ARGS)

convert-dclm: $(DEMO_READY) need-in-out
	$(BIN)/wds-tools convert documents --input $(INPUT) --output $(OUTPUT) $(ARGS)

encode: $(DEMO_READY) need-in-out
	$(BIN)/wds-tools encode --input $(INPUT) --output $(OUTPUT) $(ARGS)

export: $(DEMO_READY) need-in-out
	$(BIN)/wds-tools export hf --input $(INPUT) --output $(OUTPUT) $(ARGS)

clean:
	rm -rf $(VENV) $(PEERS) $(TRAINERS) build dist site *.egg-info demo-out train-demo-out train-proof-out bench-out .mypy_cache .pytest_cache .ruff_cache .hypothesis
