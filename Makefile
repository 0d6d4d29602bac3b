# Two commands for a fresh machine with Python 3.10+, git and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint check interpreted fuzz aot clean
demo: $(READY)
	$(BIN)/python -m recipes.demo

test: lint check interpreted aot

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

check: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal --ignore=tests/test_aot.py --ignore=tests/interpreted

# a process of its own: whether kernels are interpreted is settled when Triton is imported
interpreted: $(READY)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/interpreted

# ten times the random cases of `interpreted`, others every time
fuzz: $(READY)
	TRITON_INTERPRET=1 MG_FAST_FUZZ=fuzz $(BIN)/python -m pytest -n 2 --dist worksteal -k fuzz tests/interpreted

# a process of its own: what is compiled ahead of time must not have been interpreted before
aot: $(READY)
	$(BIN)/python -m pytest tests/test_aot.py

$(READY): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "mg_fast needs Python 3.10 or newer, this is $$($(PYTHON) --version)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	# Hugging Face's own `kernels`, off the path: a test puts it there to see that our folder of that name is no obstacle
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps --upgrade --target $(VENV)/hf-kernels kernels kernels-data
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
