# Two commands matter: `make demo` and `make test`. Every target builds .venv first when it is missing or out of date.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint gpu-check cuda-check gpu bench clean

BIN := .venv/bin
READY := .venv/ready
JOBS ?= 2
RESULTS := benchmarks/results
FIND_PYTHON = $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
PYTHON ?= $(FIND_PYTHON)
SOURCES := $(wildcard csrc/*.cpp csrc/*.h bindings/*.cpp bindings/*.h bindings/*/*.cpp) setup.py pyproject.toml constraints.txt \
	engine/anabranch/version.py kernels/anabranch_kernels/source_hash.py
CUDA_SOURCES := $(wildcard csrc/*.cu)

MODEL ?= engine/anabranch/assets/pystdlib-diffqkv
define PROMPT
import os


def read_lines(path):
endef
export MODEL PROMPT

help:
	@echo "make demo        generate text (MODEL=folder PROMPT=text to choose; the model in the package otherwise), then"
	@echo "                 aggregate what twenty clients learn, six of them hostile: robustly, and privately"
	@echo "make test        all tests that need no GPU"
	@echo "make lint        ruff and mypy"
	@echo "make bench       every CPU benchmark; writes benchmarks/results/"
	@echo "make gpu-check   compile all Triton kernels for sm_90 without a GPU"
	@echo "make cuda-check  compile all CUDA sources without a GPU (needs nvcc)"
	@echo "make gpu         on a machine with a GPU: its tests and benchmarks"
	@echo "make clean       remove .venv and everything built"

# The compiler is looked for before anything is downloaded; the stamp comes last, so a broken installation is repeated.
$(READY): $(SOURCES)
	@test -n "$(PYTHON)" || { echo "anabranch needs Python 3.11 or newer; none found on PATH (say where: make PYTHON=/path/to/python3)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "anabranch needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)" >&2; exit 1; }
	@command -v $(CXX) >/dev/null || { echo "anabranch needs a C++17 compiler; no '$(CXX)' on PATH (Debian, Ubuntu: apt install g++; or: make CC=clang CXX=clang++)" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig; raise SystemExit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { echo "anabranch needs Python's C headers; Python.h is missing (Debian, Ubuntu: apt install python3-dev)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { rm -rf .venv; echo "could not make .venv (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@echo "setting up .venv: torch, then the rest, then the C++ kernels; some minutes, once"
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt 'setuptools>=77' 'pybind11>=3.0' ninja
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[test]'
	@touch $@

demo: $(READY)
	@$(BIN)/anabranch generate "$$MODEL" --prompt "$$PROMPT" --temperature 0.6
	@echo; echo
	@$(BIN)/anabranch demo robust

test: $(READY)
	$(BIN)/pytest -n $(JOBS) --dist worksteal tests

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy engine kernels

gpu-check: $(READY)
	$(BIN)/python -m anabranch_kernels.gpu_check --jobs $(JOBS)

# CUDA sources are optional; Triton is the GPU path that everybody has.
cuda-check:
	@command -v nvcc >/dev/null || { echo "make cuda-check needs nvcc on PATH" >&2; exit 1; }
	@for source in $(CUDA_SOURCES); do for arch in 80 90a; do \
	    echo "$$source for sm_$$arch"; \
	    nvcc -std=c++17 -O3 -Icsrc -Xptxas --warn-on-spills,-Werror -gencode arch=compute_$$arch,code=sm_$$arch -c $$source -o /dev/null || exit 1; \
	done; done
	@echo "CUDA sources compiled: $(words $(CUDA_SOURCES))"

# GPU_PYTHON=python3 takes an environment that is there: torch built for CUDA, this package importable.
gpu: $(if $(GPU_PYTHON),,$(READY))
	$(or $(GPU_PYTHON),$(BIN)/python) benchmarks/gpu/run.py

bench: $(READY)
	mkdir -p $(RESULTS)
	$(BIN)/anabranch bench attention --json $(RESULTS)/attention.json --markdown $(RESULTS)/attention.md --plot $(RESULTS)/attention.png
	$(BIN)/anabranch bench linear --json $(RESULTS)/linear.json --markdown $(RESULTS)/linear.md
	$(BIN)/anabranch bench engine --json $(RESULTS)/engine.json --markdown $(RESULTS)/engine.md
	$(BIN)/anabranch bench geometric-median --json $(RESULTS)/geometric_median.json --markdown $(RESULTS)/geometric_median.md
	$(BIN)/anabranch bench coordinate-rules --json $(RESULTS)/coordinate_rules.json --markdown $(RESULTS)/coordinate_rules.md --plot $(RESULTS)/coordinate_rules.png
	$(BIN)/anabranch bench aggregate --repeats 5 --json $(RESULTS)/aggregate.json --markdown $(RESULTS)/aggregate.md
	$(BIN)/anabranch bench field-coding --threads 1 --repeats 7 --json $(RESULTS)/field_coding.json --markdown $(RESULTS)/field_coding.md
	$(BIN)/anabranch bench rank-lora --json $(RESULTS)/rank_lora.json --markdown $(RESULTS)/rank_lora.md --plot $(RESULTS)/rank_lora.png
	$(BIN)/anabranch bench triadapt --threads 1 --repeats 20 --rows 512 2048 --layers 2 --json $(RESULTS)/triadapt.json --markdown $(RESULTS)/triadapt.md
	$(BIN)/anabranch bench adapters --repeats 7 --json $(RESULTS)/adapters.json --markdown $(RESULTS)/adapters.md
	$(BIN)/anabranch bench secagg --json $(RESULTS)/secagg.json --markdown $(RESULTS)/secagg.md
	$(BIN)/anabranch bench federated --threads 2 --json $(RESULTS)/federated.json --markdown $(RESULTS)/federated.md
	$(BIN)/anabranch bench serve --repeats 3 --json $(RESULTS)/serve.json --markdown $(RESULTS)/serve.md

clean:
	rm -rf .venv build dist engine/*.egg-info *.egg-info kernels/anabranch_kernels/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
