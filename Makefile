# Every target sets itself up: finds a Python, makes .venv, installs the pinned requirements. The second call skips that.

VENV := .venv
PY   := $(VENV)/bin/python
ARGS ?=
MODE ?= image

# Tried in this order; another one: make run PYTHON=/path/to/python3.12
PYTHON ?= $(firstword $(foreach name,python3.12 python3.11 python3.13 python3.14 python3 python,$(shell \
	$(name) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v $(name))))

.DEFAULT_GOAL := help
.PHONY: help run test test-busy fuzz soak faults audit lint train-toybox bench check-published setup setup-dev clean

help:                   ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

run: setup              ## start the app on http://127.0.0.1:7860
	$(PY) app.py $(ARGS)

# Half of the time is waiting for a browser, a server or a process: a worker for each core, which shares the others' work.
WORKERS = --numprocesses auto --maxprocesses 4 --dist worksteal

test: lint              ## ruff, then every test
	$(PY) -m pytest $(WORKERS) $(ARGS)

# The busy ones have the tests' own priority: at a higher one they would leave them a sixtieth of the time.
test-busy: lint         ## every test three times, at lowest priority beside a busy process on each core
	@busy=""; for _ in $$(seq $$(getconf _NPROCESSORS_ONLN)); do nice -n 19 sh -c 'while :; do :; done' & busy="$$busy $$!"; done; \
	trap 'kill $$busy' EXIT INT TERM; \
	for round in 1 2 3; do echo "round $$round of 3"; nice -n 19 $(PY) -m pytest $(WORKERS) $(ARGS) || exit 1; done

fuzz: setup-dev         ## 5,000 hostile requests to the app, and what became of them
	$(PY) -m tests.fuzz $(ARGS)

soak: setup-dev         ## 250 runs by four clients, some of which cancel or hang up
	$(PY) -m tests.soak $(ARGS)

faults: setup-dev       ## killed runs, full disks, no memory, two servers, slow clients, and what became of each
	$(PY) -m tests.faults $(ARGS)

# What requirements.txt has brought in, by name and version: a CPU build of torch is the same release.
audit: setup-dev        ## every installed package beside the published advisories
	$(PY) -m pip freeze | sed 's/+.*//' | \
		$(PY) -m pip_audit --strict --disable-pip --no-deps --progress-spinner off -r /dev/stdin

lint: setup-dev         ## ruff
	$(PY) -m ruff check .

train-toybox: setup     ## make assets/toybox from nothing (resumes where it stopped)
	$(PY) -m psd.toybox.train $(ARGS)
	$(PY) -m psd.toybox.train_mvdream $(ARGS)

bench: setup            ## measure a table of the README: make bench MODE=scene
	$(PY) -m psd.bench $(MODE) $(ARGS)

check-published: setup  ## download every published model and compare it with what its authors say
	$(PY) -m psd.check published $(ARGS)

clean:                  ## remove the environment, caches and outputs of the command line
	rm -rf $(VENV) .pytest_cache .ruff_cache outputs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

setup: $(VENV)/.installed
setup-dev: $(VENV)/.installed-dev

# A stamp is written only after pip succeeded: an interrupted set-up is simply done again.
$(VENV)/.installed: requirements.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer with its venv module is needed and was not found:" \
		"install it (Debian and Ubuntu: apt install python3 python3-venv) or give its path, make PYTHON=/path/to/python3.12." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than Python 3.11:" \
		"give a newer one, make PYTHON=/path/to/python3.12." >&2; exit 1; }
	@echo "Setting up $(VENV) with $(PYTHON): once, one to three minutes."
	"$(PYTHON)" -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@
