# SPDX-License-Identifier: MIT
# Every target does its own set-up. `make help` tells what there is.

PYTHON ?= python3
VENV ?= .venv
DEVICE ?= auto
MODEL ?=
VIDEO ?=
VLLM ?=
MINUTES ?= 60
AGAIN ?=

BIN := $(VENV)/bin
SOURCES = flashvid_vllm kernels tests benchmarks setup.py
# tests marked `gpu` run where there is a GPU
MARKS = $(shell nvidia-smi -L >/dev/null 2>&1 || test -e /dev/kfd || echo "not gpu")
# one more than cores: servers and engines wait while they start
WORKERS ?= 3
PYTEST = $(BIN)/python -m pytest -q -m "$(MARKS)" -n $(WORKERS) --dist loadscope --no-loadscope-reorder

# vLLM imports 4000 modules in every process: 34 s of a slow core without their bytecode, 14 s with it
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-full gpu compat check wheel bench fidelity serving frames soak tinyvlm clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'
	@echo
	@echo "  make demo MODEL=Qwen/Qwen2.5-VL-7B-Instruct VIDEO=clip.mp4    the same with your model and your video"
	@echo "  VENV=PATH another environment   PYTHON=python3.12 another Python   DEVICE=cpu|cuda not what is found"

setup: ## make the environment in .venv (vLLM for this machine, tools, this project)
	@$(PYTHON) tests/env/install.py --venv "$(VENV)" --device "$(DEVICE)"

demo: setup ## serve a model, ask about a video: plain, on a quarter and on a tenth of its tokens
	@$(BIN)/python -m benchmarks.demo $(if $(MODEL),--model "$(MODEL)") $(if $(VIDEO),--video "$(VIDEO)")

test: setup ## the tests
	FLASHVID_TESTS=quick $(PYTEST)

test-full: setup ## what is longer: wide matrices, more servers, sanitizers
	FLASHVID_TESTS=full $(PYTEST) --longer

# asked before anything is installed
gpu: ## all that needs an NVIDIA GPU, in 25 minutes, into benchmarks/results/gpu-NAME.md; goes on where it was
	@$(PYTHON) -m benchmarks.gpu.device
	@$(MAKE) --no-print-directory setup
	@$(BIN)/python -m benchmarks.gpu $(if $(MODEL),--model "$(MODEL)") $(if $(AGAIN),--again "$(AGAIN)")

compat: setup ## other vLLM releases, the supported or VLLM=0.31.0: what we build on, engines, a server (0.3 GB each, once)
	@$(BIN)/python -m tests.serving.release $(VLLM) --workers $(WORKERS)

check: setup ## lint, format and types
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

wheel: setup ## dist/: a wheel that installs without a compiler, and the source distribution
	@$(BIN)/python -m tests.house.wheel

bench: setup ## time the operations
	@$(BIN)/python -m benchmarks.ops

fidelity: setup ## what every method keeps of real clips: CLIP's last layers on the compressed tokens
	@$(BIN)/python -m benchmarks.fidelity

serving: setup ## plain vLLM, EVS, VidCom2 and FlashVID under load: half an hour on 2 cores, goes on where it was
	@$(BIN)/python -m benchmarks.serving $(if $(MODEL),--model "$(MODEL)")

frames: setup ## 16 to 160 frames of a video under one budget, against plain vLLM
	@$(BIN)/python -m benchmarks.frames

soak: setup ## a server under a random mix of requests, good, bad and broken off: an hour, or MINUTES=10
	@$(BIN)/python -m benchmarks.soak --minutes $(MINUTES)

tinyvlm: setup ## accuracy of every method on a small video LLM trained here: 1 h on 2 cores, goes on where it was
	@$(BIN)/python -m benchmarks.tinyvlm all

clean: ## remove what make has made: the environment, caches, clips, build products
	rm -rf .venv .cache build dist *.egg-info flashvid_vllm/_native*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
