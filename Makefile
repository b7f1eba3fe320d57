# make train: a small model learns to write, on any machine.   make test: the tests.   make help: all targets.
PYTHON ?= python3
NAME ?= first
STEPS ?= 1400
CALL ?= A
BIN := .venv/bin
RUN := $(BIN)/python
CSRC := $(shell find csrc -type f 2>/dev/null)

.PHONY: help train test data build lint format bench chat spike chaos gpu-check cuda-check clean

help:            ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

train: .venv/.installed data/python_text_document.idx   ## train the tiny model on this machine's own text, into runs/first
	$(RUN) -m megalm.launch +model=tiny +experiment=first run.name=$(NAME) train.steps=$(STEPS)

test: .venv/.test   ## run the tests
	$(RUN) -m pytest

data: data/python_text_document.idx   ## tokenize the installed Python's sources and documentation

data/python_text_document.idx: | .venv/.installed
	$(RUN) -m tools.tokenize python-corpus --train-bpe 8192 --output data/python

build: .venv/.installed   ## build the C++ (and, with a CUDA torch and nvcc, CUDA) extension in place

# Packages by constraints.txt; torch is installed first and by its pinned version, since nothing else may choose it.
# Without a GPU, TORCH_INDEX=https://download.pytorch.org/whl/cpu spares gigabytes of CUDA libraries.
.venv/.torch: constraints.txt
	@test -x $(RUN) || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
	    "$$(grep '^torch==' constraints.txt)" numpy setuptools wheel pybind11 ninja
	@touch $@

.venv/.installed: .venv/.torch pyproject.toml setup.py $(CSRC)
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable .
	@$(RUN) -c "import torch, megalm._C" 2>/dev/null || echo "warning: the C++ extension was not built (is there a" \
	    "C++17 compiler, g++ or clang++?): the plain PyTorch ops serve, more slowly" >&2
	@touch $@

.venv/.test: .venv/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[test]"
	@touch $@

lint: .venv/.test   ## ruff, mypy and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.cpp' 'tests/*.cu' 'tools/*.c')

format: .venv/.test   ## rewrite the sources in the project's form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.cpp' 'tests/*.cu' 'tools/*.c')

bench: .venv/.test   ## train the same shape in Hugging Face transformers and here, in one run
	$(RUN) -m tools.bench train

chat: .venv/.installed   ## a tiny model learns to answer, then to add: pretraining, instructions, reinforcement (3 minutes)
	$(RUN) -m tools.posttrain example data/chat
	$(RUN) -m tools.tokenize data/chat/texts.jsonl --tokenizer data/chat/tokenizer --output data/chat/texts
	$(RUN) -m tools.posttrain prepare data/chat/instructions.jsonl --tokenizer data/chat/tokenizer --output data/chat/instructions
	$(RUN) -m megalm.launch +model=tiny +experiment=chat/pretrain
	$(RUN) -m megalm.launch +model=tiny +experiment=chat/tune
	$(RUN) -m megalm.launch +model=tiny +experiment=chat/reinforce
	$(RUN) -m tools.posttrain verify runs/chat-tuned runs/chat-reinforced --html runs/chat-answers.html \
	    --prompts data/chat/held_out.jsonl data/chat/sums.jsonl data/chat/other_held_out.jsonl
	@echo "talk to it: $(RUN) -m tools.chat runs/chat-reinforced"

spike: .venv/.installed data/python_text_document.idx   ## the same damage with the guard and without it, on one page (2 minutes)
	$(RUN) -m megalm.launch +model=tiny +experiment=spike/zeroed_second_moment run.name=spike
	$(RUN) -m megalm.launch +model=tiny +experiment=spike/zeroed_second_moment run.name=spike-unguarded guard=watch
	$(RUN) -m tools.compare runs/spike runs/spike-unguarded --html runs/spike.html

chaos: .venv/.installed data/python_text_document.idx   ## kill a rank of a small run on purpose and watch it go on
	$(RUN) -m megalm.launch +model=tiny +experiment=chaos/killed run.name=chaos

cuda-check: .venv/.installed   ## compile every CUDA kernel with nvcc; registers, shared memory, spills
	$(RUN) scripts/cuda_check.py

gpu-check:       ## on a machine with a GPU: build, test, train, measure (CALL=A), beside others (CALL=B)
	bash scripts/gpu_check.sh $(CALL)

clean:           ## remove builds (not .venv, data and runs)
	rm -rf build dist *.egg-info megalm/*.so
