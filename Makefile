# Every target is complete from a bare checkout: it finds a Python, makes its environment, installs, runs.
# `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTEST_OPTIONS := -n 2 --dist loadgroup --durations=15 --timeout=900 --timeout-method=thread
PACKAGES := foejax sharding pallas_kernels
# What the oldest supported JAX could break: the model, its bindings, the kernels.
TESTS_311 := $(wildcard tests/test_config.py tests/test_packaging.py tests/test_model*.py tests/test_layout*.py \
    tests/test_router.py tests/test_grouped_*.py tests/test_*_topk.py tests/test_combine.py)

.PHONY: help demo test test-slow test-311 test-kernels aot parity lint bench slurm clean

help: ## this list
	@sed -n 's/^\([a-z0-9-]*\):[^#]*## /\1	/p' $(MAKEFILE_LIST) | expand -t 12

demo: .venv/.installed ## train the tiny FoE and MoE models side by side into runs/demo
	.venv/bin/python -m experiments.demo

test: .venv/.installed ## all tests but the slow and the parity ones
	.venv/bin/python -m pytest $(PYTEST_OPTIONS) -m "not slow and not parity and not kernels and not aot"

test-slow: .venv/.installed ## the tests that take minutes
	.venv/bin/python -m pytest $(PYTEST_OPTIONS) -m "slow"

test-311: .venv311/.installed ## a fast subset on Python 3.11 with its older JAX
	.venv311/bin/python -m pytest $(PYTEST_OPTIONS) -m "not slow and not parity and not kernels and not aot" $(TESTS_311)

parity: .venv-parity/.installed ## the tests against torch and transformers, in an environment of their own (3.11)
	.venv-parity/bin/python -m pytest $(PYTEST_OPTIONS) -m parity

test-kernels: .venv-kernels/.installed ## the GPU kernels in interpreters, in an environment of their own (Triton: 1 GB)
	.venv-kernels/bin/python -m pytest $(PYTEST_OPTIONS) -m kernels

aot: .venv-aot/.installed ## compile the GPU kernels for an H200 without one, in a small environment of their own
	.venv-aot/bin/python -m pytest $(PYTEST_OPTIONS) -m aot

lint: .venv/.installed ## formatting, ruff, mypy
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy $(PACKAGES)

bench: .venv/.installed ## the benchmark scripts of a CPU, experiments/bench_*.py
	@set -e; for script in $(filter-out bench_kernels,$(notdir $(basename $(wildcard experiments/bench_*.py)))); do \
	    echo "experiments.$$script"; .venv/bin/python -m experiments.$$script; done

slurm: .venv/.installed ## experiments/launch/train.sbatch on a Slurm cluster of two nodes, here (root, Slurm, munge)
	.venv/bin/python -m experiments.launch.try_slurm

clean: ## remove environments, caches and build outputs; runs/ stays
	rm -rf .venv .venv311 .venv-parity .venv-kernels .venv-aot build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find foejax sharding pallas_kernels experiments tests -name __pycache__ -prune -exec rm -rf {} +

.venv/.installed: pyproject.toml constraints.txt
	@.ci/make-environment .venv dev 3.12 3.13 3.11

.venv311/.installed: pyproject.toml constraints.txt
	@.ci/make-environment .venv311 dev 3.11

.venv-kernels/.installed: pyproject.toml constraints.txt
	@.ci/make-environment .venv-kernels dev,triton,deviceless 3.12 3.13

.venv-aot/.installed: pyproject.toml constraints.txt
	@.ci/make-environment .venv-aot dev,deviceless 3.12 3.13

.venv-parity/.installed: pyproject.toml constraints.txt
	@.ci/make-environment .venv-parity dev,parity 3.11
