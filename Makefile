# Every target installs what it needs into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := pyproject.toml .ci/constraints.txt $(wildcard csrc/*)
RUNS ?= runs/demo
# SLOW=1 runs the long tests as well.
MARKS := $(if $(SLOW),,-m "not slow")

.PHONY: help install demo test lint kernels bench gpu quality clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP)  ## install the package and all that its tests need into .venv

$(STAMP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt --editable ".[test,lint]"
	touch $(STAMP)

demo: $(STAMP)  ## train a small base model, fine-tune it with OwLore, show the loss falling (under 6 minutes on two cores)
	$(BIN)/lisa-kernels finetune --model preset:tiny --data stdlib:code --max-data-bytes 3000000 \
		--method full --lr 4e-3 --lr-schedule cosine --warmup-steps 20 --steps 300 --batch-size 8 --seq-len 128 \
		--output $(RUNS)/base --overwrite
	$(BIN)/lisa-kernels finetune --model $(RUNS)/base --data stdlib:docstrings \
		--method owlore --active-layers 4 --period 10 --rank 32 --lr 4e-3 --steps 200 --batch-size 8 --seq-len 128 \
		--output $(RUNS)/tuned --overwrite

test: $(STAMP)  ## run the tests, one process a core (SLOW=1: the long ones too)
	$(BIN)/python -m pytest $(MARKS) --numprocesses logical --maxprocesses 8 --dist worksteal

lint: $(STAMP)  ## check format, lint rules and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

kernels: $(STAMP)  ## compile every GPU kernel for seven targets, report its machine code, check it against its budgets
	$(BIN)/python -m bench.kernels --check

bench: $(STAMP)  ## time optimizers, layers and steps beside their peers, plan their memory, record the rows
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt --editable ".[bench]"
	$(BIN)/lisa-kernels bench optimizer --small-tensors --record
	$(BIN)/lisa-kernels bench lowrank --record
	$(BIN)/lisa-kernels bench step --record
	$(BIN)/python -m bench.memory --record --plot bench/results/memory.png

gpu: $(STAMP)  ## on a machine with a GPU: the same tests and benchmarks there
	$(BIN)/python -c "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 'make gpu: torch sees no GPU here')"
	$(BIN)/python -m pytest
	$(BIN)/lisa-kernels bench optimizer --device cuda --small-tensors --record
	$(BIN)/lisa-kernels bench lowrank --device cuda --record
	$(BIN)/lisa-kernels bench step --device cuda --record

quality: $(STAMP)  ## run the comparison of all methods (about an hour on two cores; goes on where it stopped)
	$(BIN)/python -m bench.quality

clean:  ## delete .venv, builds and runs
	rm -rf $(VENV) build runs
