# Every target sets up what it needs in $(VENV), once, and then does its one job.
#   PYTHON  the interpreter to build the environment from     VENV  where the environment lives
#   RUN     the folder of the demo's run; name one again to continue it

PYTHON ?= python3
VENV ?= .venv
ifndef RUN
RUN := runs/demo-$(shell date +%Y%m%d-%H%M%S)
endif

PY := $(VENV)/bin/python
READY := $(VENV)/.ready
# What is small is done by one thread: several wait for each other, on a busy machine twenty times as long.
ONE := OMP_NUM_THREADS=1 $(PY)
# Two workers on two cores: threads inside each would only fight over them.
PYTEST := $(ONE) -m pytest -n 2 --dist loadgroup

.PHONY: help setup demo test soak gpu lint docs wheel clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*  ## /  make \1  \t/p' Makefile

setup: $(READY)  ## the environment alone

demo: $(READY)  ## meta-train Steered from its hand-made start, then measure both on other kinds of problems
	$(ONE) -m meta_train experiment=demo run=$(RUN)
	$(ONE) -m meta_train.evaluate experiment=demo 'source=[$(RUN)/checkpoint,$(RUN)/start,default]' \
		out=$(RUN)/evaluation jobs=2

test: lint  ## lint, then all tests
	$(PYTEST)

soak: $(READY)  ## kill a run 50 times, which CI does 5 times
	L2O_KILLS=50 $(ONE) -m pytest tests/test_kill.py

gpu:  ## check and measure a GPU in eight minutes, with PY=python3 where that has torch; without one, small on the CPU
	$(shell command -v $(PY) || echo $(PYTHON)) -m meta_train.gpu

lint: $(READY)  ## style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

docs: $(READY)  ## build/site: the documentation, warnings as errors, no network
	NO_MKDOCS_2_WARNING=1 $(ONE) -m mkdocs build --strict

wheel: $(READY)  ## dist/: the source archive, and the wheel built from it
	$(PY) -m build --no-isolation

clean:  ## remove what was built and cached; the environment and the runs stay
	rm -rf dist build .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# The stamp comes last, so that an interrupted set-up is done again; pip's own presence is tested because a failed
# `venv` leaves an interpreter without it.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "l2o needs Python 3.11 or later; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check -c constraints.txt -e '.[train,dev]'
	@touch $@
