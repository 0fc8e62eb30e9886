# `make demo` and `make test` need git, make and Python >= 3.11; everything else they bring themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv

.PHONY: demo test test-cluster cluster-packages test-browser browser-packages test-gpu lint lock clean

demo: $(VENV)/.installed
	$(BIN)/medpretrain demo $(if $(OUT),--out $(OUT))

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not gpu and not cluster and not browser" $(ARGS)

# Hosts on this machine: network namespaces, Debian's SLURM, sshd and buildah. As root, on Debian.
test-cluster: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m cluster tests/cluster $(ARGS)

cluster-packages:
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$(cat tests/cluster/packages.txt)

# Pages as Chromium shows them.
test-browser: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser tests/report $(ARGS)

browser-packages:
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$(cat tests/report/packages.txt)

test-gpu: $(VENV)/.installed
	$(BIN)/python -m pytest -m gpu $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.installed: requirements.lock setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "medpretrain needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv==0.13.9
	$(UV) pip install --python $(BIN)/python --no-build-isolation-package deepspeed -r requirements.lock
	$(UV) pip install --python $(BIN)/python --no-deps --editable .
	touch $@

# The pinned versions, for every supported Python; torch and torchvision as the registry ships them, with CUDA.
lock:
	$(UV) pip compile --universal --python-version 3.11 --no-emit-index-url --extra train --extra dev --upgrade \
		setup.cfg --output-file requirements.lock

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
