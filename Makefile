# make demo   install, then fine-tune the embedded model on the embedded data (examples/quickstart.py)
# make docs   build the documentation as a site, build/site/index.html, and fail on a broken link
# make fuzz   feed spoilt files to the JSON Lines reader for 60 seconds (SEED=1 for others)
# make bench  beside TRL and plain transformers, in an environment of its own (BENCH_MINUTES=20), and docs/performance.md
# make audit  compare the tested set with the published advisories (skipped, with the reason, offline)
# make test   install with the test extra, then lint and the whole suite
# make test-all  the same with the tests marked slow, and with the packages that others are skipped for without
#             (in an environment of its own; those of reports need Chromium on the PATH)
# make test-floors  the suite over the lowest versions that pyproject.toml declares (OPTIONS="--set torch==2.11.0")
# make test-newest  the suite over the newest versions there are (OPTIONS="--python python3.13")
# make test-sim  what depends on the device and all tests marked gpu, on a CUDA device that is simulated on the CPU (needs
#             a C++ compiler, and is skipped with the reason where there is none; tests/simulated_cuda/README.md)
# make soak   kill a run 200 times at random moments; each time it must go on to the same end (docs/reliability.md)
PYTHON ?= python3
BENCH := .venv-bench
BENCH_MINUTES ?= 20
BENCH_OPTIONS ?=
VENV := .venv
ALL := .venv-all
OPTIONS ?=
BIN := $(VENV)/bin
MODEL ?=
DATA ?=

.PHONY: audit bench demo docs test test-all test-floors test-newest test-sim soak lint format fuzz clean

demo: $(VENV)/.demo
	$(BIN)/python examples/quickstart.py $(if $(MODEL),--model "$(MODEL)") $(if $(DATA),--data "$(DATA)")

# Bytecode is written whatever the environment says: the suite starts some fifty processes.
test: export PYTHONDONTWRITEBYTECODE :=
test: lint
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow" --ignore tests/simulated_cuda
	SIMULATED_CUDA=2 $(BIN)/python -m pytest -q -n 2 --dist worksteal tests/simulated_cuda

test-all: export PYTHONDONTWRITEBYTECODE :=
test-all: lint $(ALL)/.ready
	$(ALL)/bin/python -m pytest -q -n 2 --dist worksteal --ignore tests/simulated_cuda
	SIMULATED_CUDA=2 $(ALL)/bin/python -m pytest -q -n 2 --dist worksteal tests/simulated_cuda

test-floors test-newest: test-%:
	$(PYTHON) scripts/other_versions.py $* $(OPTIONS)

test-sim: export PYTHONDONTWRITEBYTECODE :=
test-sim: $(VENV)/.test
	SIMULATED_CUDA=2 $(BIN)/python -m pytest -q -n 2 --dist worksteal tests/simulated_cuda
	SIMULATED_CUDA=1 $(BIN)/python -m pytest -q -m gpu tests/core/training tests/plugins/quantizers tests/plugins/trainers/test_micro_batches.py

docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo build/site/index.html

soak: $(VENV)/.test
	$(BIN)/python scripts/soak.py --kills 200

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(BENCH)/.ready
	$(BENCH)/bin/python benchmarks/everything.py --minutes $(BENCH_MINUTES) $(BENCH_OPTIONS)
	$(BENCH)/bin/python scripts/make_performance.py

fuzz: $(VENV)/.test
	$(BIN)/python scripts/fuzz_json_lines.py --seconds 60 --seed $(or $(SEED),0) \
		$(if $(wildcard ../shared/data/malformed),--corpus ../shared/data/malformed)

audit:
	$(PYTHON) scripts/audit.py

clean:
	rm -rf $(VENV) .venv-* build dist runs .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.test: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@ $(VENV)/.demo

$(BENCH)/.ready: pyproject.toml constraints.txt benchmarks/requirements.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[plots]" -r benchmarks/requirements.txt
	touch $@

$(ALL)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(ALL)
	$(ALL)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e ".[test,harness,wandb,trackio,deepspeed]" playwright
	touch $@
