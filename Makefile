# Three commands: `make demo`, `make test`, `make lab`. Each sets up .venv first, if it is not there yet.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Threads that wait spin only briefly: a machine that others use as well stays fast.
export GOMP_SPINCOUNT ?= 1000

.PHONY: help demo test lab
help:
	@echo "make demo   run the whole of Kyara on the sample corpus: index to evaluation, offline, in minutes"
	@echo "make test   check that notebooks and package agree, run every notebook, run the tests"
	@echo "make lab    open the notebooks in JupyterLab"

$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $(READY)

demo: $(READY)
	kyara run runs/demo.yaml

lab: $(READY)
	jupyter lab nbs $(if $(filter 0,$(shell id -u)),--allow-root)

test: $(READY)
	@$(call unchanged,nbdev-clean)
	@$(call unchanged,nbdev-export)
	nbdev-test --n-workers 2
	pytest -o faulthandler_timeout=1200

# Run a command that must leave notebooks and package as they are.
SOURCES = nbs/*.ipynb kyara/*.py
define unchanged
before=$$(sha256sum $(SOURCES)); $(1); after=$$(sha256sum $(SOURCES)); \
if [ "$$before" = "$$after" ]; then echo "$(1) changes nothing"; \
else echo "$(1) changed what is committed; run it, look at the difference and commit:"; git diff --stat -- nbs kyara; exit 1; fi
endef
