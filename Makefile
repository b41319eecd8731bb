# `make demo` and `make test` do everything from a fresh machine with Python 3.11 to 3.13, make and g++.

PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3; do \
	if command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; \
	then echo $$p; break; fi; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export DS_ACCELERATOR ?=
ifeq ($(DS_ACCELERATOR),)
unexport DS_ACCELERATOR
endif

.PHONY: help setup ffcv demo gpu wheels test drills drills-ci drills-hosts lint types docs check clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP)  ## make .venv with everything the demo and the tests need

# A stamp newer than what it was made from: a second call costs nothing.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11, 3.12 or 3.13 found: install one, or say make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

ffcv: $(STAMP)  ## build FFCV, for data.engine = "ffcv"; installs system packages where apt-get and root are there
	$(BIN)/python -m launch.machine.build_ffcv

demo: $(STAMP)  ## train SeTformer on handwritten digits: 2 ranks, ZeRO-2, one to two minutes
	$(BIN)/setformer demo

gpu: $(STAMP)  ## measure on a GPU all that is not measured yet (docs/gpu.md)
	$(BIN)/python -m benchmarks.gpu

WHEELS_PYTHON ?= 3.12
wheels: $(STAMP)  ## fetch into build/wheels what a GPU machine without a network needs (docs/gpu.md)
	mkdir -p build/wheels
	DS_BUILD_OPS=0 $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --constraint constraints.txt \
		--wheel-dir build/wheels deepspeed hjson
	grep -vE '^(#|deepspeed|hjson)' benchmarks/wheels.txt > build/wheels.txt
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --python-version $(WHEELS_PYTHON) \
		--implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
		--platform manylinux2014_x86_64 --constraint constraints.txt --dest build/wheels --requirement build/wheels.txt
	du -sh build/wheels

test: $(STAMP)  ## run the tests
	$(BIN)/python -m pytest -m "not drill" --numprocesses 2 --dist loadfile

drills: $(STAMP)  ## run the long drills: kill and resume under every stage and precision
	$(BIN)/python -m pytest -m drill --timeout 3600

# An eighth of the drills, which the commit draws, without the matrix of layouts (an hour and more, has a sample of its own).
drills-ci: $(STAMP)
	SETFORMER_DRILLS_SHARE=12 timeout --kill-after=30 2100 $(BIN)/python -m pytest -m "drill and not hosts" --timeout 600 --numprocesses 2 --dist load \
		--deselect tests/distributed/test_elastic_matrix.py::test_every_layout_continues_every_other \
		--deselect tests/numerics/test_set_triton.py::test_kernels_equal_the_reference_in_all_cases

drills-hosts: $(STAMP)  ## run the drills on several hosts: namespaces, sshd, Slurm; root, Debian packages (docs/hosts.md)
	$(BIN)/python -m pytest -m hosts --timeout 600

lint: $(STAMP)  ## ruff: lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## mypy, strict
	$(BIN)/mypy

docs: $(STAMP)  ## build the site into build/site; every warning is an error
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python -m launch.run.keys docs/keys.md
	$(BIN)/python -m mkdocs build --quiet

check: lint types test  ## all that CI runs

clean:  ## remove .venv and caches, keep runs
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
