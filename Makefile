# Two commands from a fresh clone: `make run` and `make test`. Needs python3 (>= 3.11) with venv and
# headers, and a C++20 compiler; everything else comes from pip.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROMPT ?= What is 27+48?
ARGS ?=
PYTEST_ARGS ?=
PEERS ?= .venv-peers

export PROMPT
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# The first holds for what is installed, both for what builds it, depending on pip's version.
export PIP_CONSTRAINT = constraints.txt
export PIP_BUILD_CONSTRAINT = constraints.txt
INSTALL := $(BIN)/pip install -qq
# What an installation depends on: Python sources are used in place, native ones are compiled.
SOURCES := pyproject.toml constraints.txt $(wildcard CMakeLists.txt) $(shell find native -type f 2>/dev/null)
CPP := $(shell find native -name '*.cpp' -o -name '*.h' -o -name '*.hpp' -o -name '*.inc' 2>/dev/null)

.PHONY: help run test check format bench peers clean

help: ## this list
	@grep -hE '^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

run: $(VENV)/.runtime ## set up and answer PROMPT with the model that ships with vivace
	@$(BIN)/vivace run tiny "$$PROMPT" $(ARGS) </dev/null

test: $(VENV)/.dev ## set up and run the tests (PYTEST_ARGS="-k chat" picks some)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(VENV)/.dev ## format, lint, types, tests: what CI runs before a merge
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(if $(CPP),$(BIN)/clang-format --dry-run --Werror $(CPP))
	$(BIN)/python -m pytest $(PYTEST_ARGS)

format: $(VENV)/.dev ## rewrite the sources in house style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(if $(CPP),$(BIN)/clang-format -i $(CPP))

bench: $(VENV)/.dev ## the benchmarks; results go to benchmarks/results
	$(BIN)/python -m benchmarks $(ARGS)

peers: $(PEERS)/.done $(PEERS)/openvino/.done ## build llama.cpp and install OpenVINO, to compare with; takes some minutes

clean: ## remove what builds leave behind, keep the virtual environment
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	rm -f $(VENV)/.runtime $(VENV)/.dev

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("vivace needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: $(SOURCES) | $(BIN)/python
	@echo "setting up $(VENV): the native code is compiled once, which takes a minute or two"
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.dev: $(SOURCES) | $(BIN)/python
	@echo "setting up $(VENV) for development: the native code is compiled once"
	$(INSTALL) --editable ".[dev,torch]"
	@touch $@ $(VENV)/.runtime

LLAMA_CPP := $(shell sed -n 's/^llama_cpp_python==//p' constraints-peers.txt)
$(PEERS)/.done: constraints-peers.txt
	@echo "setting up $(PEERS): llama.cpp is compiled, which takes some minutes"
	rm -rf $(PEERS)/venv $(PEERS)/source && mkdir -p $(PEERS)/source
	$(PYTHON) -m venv $(PEERS)/venv
	$(PEERS)/venv/bin/pip download -qq --no-deps --no-binary :all: --dest $(PEERS) llama-cpp-python==$(LLAMA_CPP)
	tar -xzf $(PEERS)/llama_cpp_python-$(LLAMA_CPP).tar.gz -C $(PEERS)/source --strip-components 1
	CMAKE_ARGS=-DGGML_NATIVE=ON $(PEERS)/venv/bin/pip install -qq -c constraints-peers.txt \
		$(PEERS)/llama_cpp_python-$(LLAMA_CPP).tar.gz
	@touch $@

$(PEERS)/openvino/.done: constraints-openvino.txt
	@echo "setting up $(PEERS)/openvino: OpenVINO and what makes files for it are installed"
	rm -rf $(PEERS)/openvino && mkdir -p $(PEERS)
	$(PYTHON) -m venv $(PEERS)/openvino
	PIP_CONSTRAINT= $(PEERS)/openvino/bin/pip install -qq --no-deps -r constraints-openvino.txt
	@touch $@
