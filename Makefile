# make demo and make test do all set-up themselves; see README.
BIN := .venv/bin
CAPABILITIES := netns,vxlan,nft,iptables,etcd,cni,kubectl
# In CI a test that is skipped for want of one of these is a failure; set REQUIRE= to be lenient.
REQUIRE ?= $(if $(CI),$(CAPABILITIES))
# Processes that tests run in: most tests wait, so that several save much of the time (tests/support/shards.py).
JOBS ?= 1
PYTEST := $(BIN)/python -m pytest $(if $(REQUIRE),--require=$(REQUIRE)) $(if $(filter-out 1,$(JOBS)),-p tests.support.shards -n $(JOBS))
LEVELS := unit model scenario netns interop kube fuzz
export PATH := $(PATH):/usr/sbin:/sbin

.DEFAULT_GOAL := help
.PHONY: help setup root demo test test-deploy test-all deploy-root fuzz-guided audit bench faults chaos check fmt lint types layers clean $(LEVELS)

help: ## this list
	@awk -F ':.*## ' '/^[a-z$$()A-Z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile
	@echo "  make LEVEL       one level of tests: $(LEVELS)"

setup: ## install what is missing (apt packages, .venv); the other targets do it themselves
	@deploy/bootstrap.sh

root:
	@deploy/bootstrap.sh --root

demo: root ## a real three-host cluster on this machine, shown and taken down
	@$(BIN)/flannelctl lab demo $(ARGS)

test: root ## all tests but those of test-deploy (JOBS=3: in three processes, as in CI)
	@$(PYTEST) $(ARGS)

deploy-root:
	@deploy/bootstrap.sh --deploy

test-deploy: deploy-root ## boot the unit, build and run the image, check the manifests; installs nspawn, buildah, podman
	@$(PYTEST) tests/deploy $(ARGS)

test-all: deploy-root ## test and test-deploy in one run
	@$(PYTEST) -o norecursedirs='.*' $(ARGS)

$(LEVELS): root
	@$(PYTEST) tests/$@ $(ARGS)

fuzz-guided: setup ## look for inputs that go wrong, guided by coverage (ARGS="lease_value --seconds 600")
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/pip install --disable-pip-version-check -q atheris
	@$(BIN)/python -m tests.fuzz.guided $(ARGS)

audit: setup ## ask PyPI for advisories about the locked packages
	@deploy/audit.sh

bench: root ## measure time, CPU, memory and throughput (ARGS="--quick"; ARGS=--help tells more)
	@$(BIN)/python -m tests.bench $(ARGS)

faults: root ## break things in live clusters under traffic, print what each costs (ARGS="--only F30"; --help tells more)
	@$(BIN)/python -m tests.faults $(ARGS)

chaos: root ## break things at random for some minutes (ARGS="--minutes 30 --seed 7")
	@$(BIN)/python -m tests.faults.chaos $(ARGS)

check: lint types layers test-all ## all that CI runs

fmt: setup ## format the code
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format .

lint: setup ## style and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: setup ## mypy --strict
	@$(BIN)/mypy

layers: setup ## imports go one way
	@$(BIN)/lint-imports

clean: ## remove .venv, caches and what a crashed lab left
	@[ ! -x $(BIN)/flannelctl ] || [ "$$(id -u)" != 0 ] || for name in $$($(BIN)/python -c 'from flanneld.lab.lab import sweep; print(*sweep())'); do echo "lab $$name removed"; done
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
