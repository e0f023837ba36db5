# Two commands set everything up by themselves: make evaluate, make test.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
# The pages then name the command as any reader starts it, wherever they were built.
SHARED := PATH="$(CURDIR)/$(BIN):$$PATH" dbes
# Two processes of one thread each: twice as fast as one process of two threads.
# Bytecode is kept whatever the environment says: both workers, and the processes that tests start, read it instead of compiling again.
TESTS := $(OFFLINE) OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2

.PHONY: evaluate test test-slow check lint types contracts docs model benchmark-data wheel imports layout benchmarks leaderboard entries reports browser clean

evaluate: $(READY)  ## Evaluate the embedded checkpoint on the embedded benchmark.
	$(OFFLINE) $(BIN)/dbes evaluate --model embedded --tasks embedded --output-path results

test: $(READY)  ## The tests that finish in minutes; a file stays with one worker, which makes its fixtures once.
	$(TESTS) --dist loadfile

test-slow: $(READY)  ## The simulations and the other slow tests.
	$(TESTS) -m slow

check: lint types contracts  ## What else must be clean.

lint: $(READY)
	$(BIN)/ruff check dbes tests benchmarks benchmark_data

types: $(READY)
	$(BIN)/basedpyright

contracts: $(READY)
	$(BIN)/lint-imports

wheel: $(READY)  ## Build the wheel, install it alone, and use it from a folder of its own.
	tests/wheel.sh $(BIN)/python

imports: $(READY)  ## The import graph as a table.
	$(BIN)/python benchmarks/imports.py

layout: $(READY)  ## The list of modules in CONTRIBUTING.md.
	$(BIN)/python benchmarks/layout.py

docs: $(READY)  ## The pages that scripts write: the API, the commands, what well-known checkpoints take.
	$(BIN)/python docs/api.py
	$(BIN)/python docs/plan.py
	$(BIN)/python docs/commands.py

benchmarks: $(READY)  ## Speed and memory, as ratios within one run.
	$(OFFLINE) $(BIN)/python benchmarks/recording.py build/recording.json
	$(OFFLINE) $(BIN)/python benchmarks/scoring.py build/scoring.json
	$(OFFLINE) $(BIN)/python benchmarks/importing.py build/importing.json
	$(OFFLINE) $(BIN)/python benchmarks/exporting.py build/exporting.json

leaderboard: $(READY)  ## Check the shipped results and rebuild reports/leaderboard.html from them.
	$(OFFLINE) $(BIN)/dbes compare reports/entries --check
	$(OFFLINE) $(BIN)/dbes compare reports/entries --format html --output reports/leaderboard.html

entries: $(READY)  ## Make the shipped results again: trains, evaluates and scores what they are of.
	$(OFFLINE) PATH="$(CURDIR)/$(BIN):$$PATH" reports/entries.sh build/entries

reports: leaderboard  ## Build every page below reports/ from the data beside it.
	for folder in reports/entries/*/ reports/intervention/*/; do \
	  test ! -f $$folder/result.json -a ! -f $$folder/intervention.json || $(OFFLINE) $(SHARED) report $${folder%/} || exit 1; done
	$(OFFLINE) $(SHARED) testbed report reports/testbed
	$(OFFLINE) $(BIN)/python reports/real/build.py

browser: $(READY) build/axe/package/axe.min.js  ## The pages in a real headless Chromium.
	command -v chromium > /dev/null || (apt-get update -qq && apt-get install -qq --yes chromium)
	$(OFFLINE) $(BIN)/python -m pytest -m browser tests/browser

build/axe/package/axe.min.js:
	mkdir -p build/axe
	command -v npm > /dev/null || (apt-get update -qq && apt-get install -qq --yes npm)
	cd build/axe && npm pack --silent axe-core@4 && tar xzf axe-core-4*.tgz

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) build results .pytest_cache .ruff_cache .hypothesis
