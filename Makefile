# Two commands set up a fresh machine: `make demo` and `make test`. They need make, a shell, coreutils and Python.
PYTHON ?= python3
# Which of pyproject.toml's extras the tests get: EXTRAS=dev,eval,ray adds those with Open3D and with Ray.
EXTRAS ?= dev
# What `make test-latest` takes for torch; TORCH=torch==2.13.0 where a smaller build of it is offered.
TORCH ?= torch
VENV := .venv
LATEST := .venv-latest
BIN := $(VENV)/bin
INSTALL := -m pip install --quiet --disable-pip-version-check
# As variables, since they hold for what builds a package too; before 25.3 pip reads the first there, after it the second.
LOCKED := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(BIN)/python $(INSTALL)
PARALLEL := -m pytest --numprocesses=logical --maxprocesses=8
TESTS := $(PARALLEL) --dist=worksteal
SCRIPTS := $(addprefix -m ,$(basename $(notdir $(wildcard scripts/*.py scripts/*/*.py))))

UV ?= uv

.PHONY: demo test test-latest docs docs-check lint coverage distribution lock clean

demo: $(VENV)/.installed
	$(BIN)/geoaccel demo --overwrite

test: $(VENV)/.installed-$(EXTRAS)
	$(BIN)/python $(TESTS)

# The newest of everything that pyproject.toml allows, today: the next release of a package is met on purpose.
test-latest: | $(LATEST)/bin/python
	$(LATEST)/bin/python $(INSTALL) --upgrade --upgrade-strategy eager '$(TORCH)' --editable '.[$(EXTRAS)]'
	$(LATEST)/bin/python -m pip list --disable-pip-version-check
	$(LATEST)/bin/python $(TESTS)

# Pages of docs/ as a site, in build/site; strict, and without a network.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python scripts/staged.py mkdocs build --strict --quiet --config-file $(CURDIR)/mkdocs.yml

docs-check: $(VENV)/.installed-$(EXTRAS)
	$(BIN)/python $(PARALLEL) --dist=loadfile docs

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python scripts/staged.py mypy -p geoaccel $(SCRIPTS)

# Lines that the suite runs, of every package.
coverage: $(VENV)/.installed-$(EXTRAS)
	$(LOCKED) 'coverage>=7.6'
	$(BIN)/python -m coverage run --source geoaccel,models,eval -m pytest -q
	$(BIN)/python -m coverage report --skip-covered --sort cover

# Both files of a release in dist/, then the wheel in an empty environment, as its users will have it.
distribution: $(VENV)/.installed-dev
	rm -rf dist build/lib build/empty
	$(BIN)/python -m build
	$(PYTHON) -m venv build/empty
	build/empty/bin/python $(INSTALL) --constraint constraints.txt dist/*.whl
	cd build && empty/bin/geoaccel info vggt-mini && empty/bin/geoaccel demo --frames 4 --out empty/demo --overwrite

# The newest of everything again, for every extra and for Python 3.11 and later. Torch is said here: a release for which
# a build without CUDA is at hand wherever the tests run.
lock:
	echo 'torch==2.13.0' | $(UV) pip compile --quiet --universal --python-version 3.11 --all-extras --upgrade \
		--constraint - --custom-compile-command 'make lock' pyproject.toml --output-file constraints.txt

$(BIN)/python $(LATEST)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON) here: apt-get install python3 python3-venv" >&2; exit 1; }
	@$(PYTHON) scripts/check_machine.py
	$(PYTHON) -m venv $(@D:/bin=)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(LOCKED) --editable .
	touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	$(LOCKED) --editable '.[$*]'
	@$(BIN)/python scripts/check_machine.py open3d
	touch $@

clean:
	rm -rf $(VENV) $(LATEST) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache geoaccel-demo
