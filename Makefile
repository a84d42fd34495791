# make demo | check | test | test-oldest | compat | lint | fuzz | soak | fidelity | serving | clean. Everything is installed into .venv, another SGLang into .venv-RELEASE; nothing else on the machine is touched.

PYTHON ?= python3.11
# the release that all figures are of; another goes into an environment of its own: make compat SGLANG=0.5.23
SGLANG := 0.5.17
VENV := .venv
WORKERS ?= 2
BIN := $(VENV)/bin
UV := $(shell command -v uv 2>/dev/null)
# compiled as pip does: without it every server that a test starts would compile SGLang again
INSTALL := $(if $(UV),$(UV) pip install --compile-bytecode --python $(BIN)/python,$(BIN)/python -m pip install)

.PHONY: demo check test test-oldest compat compat-tests lint fuzz soak fidelity serving clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed-demo
	$(BIN)/hardkv demo

# some groups of tests at a time, each worker with servers of its own; then, one by one, what measures time (5: none of it was chosen)
test: $(VENV)/.installed-test
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadgroup --no-loadscope-reorder -m 'not alone' $(PYTEST_ARGS)
	$(BIN)/python -m pytest -m alone $(PYTEST_ARGS) || test $$? -eq 5

# what touches SGLang, and servers that compress: exact below the first event, cache, retraction, strict checks
COMPAT_TESTS := tests/engine tests/cli/test_doctor.py tests/e2e/test_exactness.py tests/e2e/test_radix.py tests/e2e/test_retracted_twins.py tests/e2e/test_startup.py
compat:
	$(MAKE) compat-tests VENV=.venv-$(SGLANG) SGLANG=$(SGLANG)

test-oldest:
	$(MAKE) compat-tests VENV=.venv-0.5.17 SGLANG=0.5.17

compat-tests: $(VENV)/.installed-test
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadgroup --no-loadscope-reorder $(COMPAT_TESTS) $(PYTEST_ARGS)

# what a change has to pass before it is shown to others: minutes, no server; `make test` has the rest
check: lint
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadgroup --no-loadscope-reorder -m 'not e2e and not alone and not slow' $(PYTEST_ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# nightly: 2000 hostile requests, each to our server and to a stock one (3 to 4 s each on two busy cores), FUZZ_SEED chooses others; 1500
# turns of one conversation (not run so far: the attention of the prefills alone takes 20 minutes of a core)
FUZZ_SEED ?= $(shell date +%Y%m%d)
fuzz: $(VENV)/.installed-test
	$(BIN)/python -m pytest -s -o timeout=14400 tests/e2e/test_hostile_input.py --hostile-cases 2000 --hostile-seed $(FUZZ_SEED)
	$(BIN)/python -m pytest -o timeout=7200 tests/e2e/test_adversarial_chain.py --chain-turns 1500

# mixed load for ten minutes, then what must hold; SOAK_ARGS='--minutes 60 --out soak.json'
soak: $(VENV)/.installed-test
	$(BIN)/python -m bench.soak $(SOAK_ARGS)

# resumable; FIDELITY_ARGS=--quick for two short documents and three configurations
fidelity: $(VENV)/.installed-test
	$(BIN)/python -m bench.fidelity $(FIDELITY_ARGS)

# resumable; SERVING_ARGS='--preset smoke' for some minutes, '--preset gpu' on a GPU
serving: $(VENV)/.installed-test
	$(BIN)/python -m bench.serving $(SERVING_ARGS)

clean:
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# a stamp is as new as its pyproject.toml, so that a second run installs nothing
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	@echo "installing hardkv-sglang[$*] and SGLang $(SGLANG) into $(VENV) (first time: some gigabytes)"
	$(INSTALL) --editable '.[$*]' 'sglang==$(SGLANG)'
	@touch $@

$(BIN)/python:
	$(if $(UV),$(UV) venv --python $(PYTHON) $(VENV),$(PYTHON) -m venv $(VENV))
