# What one does with this repository. `make` alone lists it. PYTHON chooses the interpreter.
PYTHON ?= python3
PREFIX ?= /usr/local
DESTDIR ?=
# The Pythons for the archive's bytecode and for test-all; else each one from 3.9 on found here.
PYTHONS ?=
# More for pytest, such as ARGS='tests/test_cron.py -x'.
ARGS ?=

.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z-]*\): .*## /\1|/p' Makefile \
		| awk -F'|' '{ printf "  make %-10s %s\n", $$1, $$2 }'

.PHONY: run
run: ## start the scheduler with the example jobs; Ctrl-C ends it
	$(PYTHON) roexec.py server --config examples/config-local.yml --jobs examples/jobs.yml

# pytest_of PYTHON VENV: sets $python to PYTHON if it has pytest, else to VENV's, made if need be.
pytest_of = set -e; python=$(1); \
	if ! $$python -c 'import pytest' 2>/dev/null; then \
		if ! $(2)/bin/python -c 'import pytest' 2>/dev/null; then \
			$$python -m venv $(2); $(2)/bin/python -m pip install --quiet pytest; \
		fi; \
		python=$(2)/bin/python; \
	fi

.PHONY: test
test: ## run the tests (where Python has no pytest, in a .venv that gets one)
	@$(call pytest_of,$(PYTHON),.venv); $$python -m pytest $(ARGS)

.PHONY: test-all
test-all: ## run the tests under each Python from 3.9 on found here
	@failed=; for each in $$($(PYTHON) zipapp/build.py --list $(PYTHONS)); do \
		version=$$($$each -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
		echo "== Python $$version ($$each)"; \
		( $(call pytest_of,$$each,.venvs/$$version); $$python -m pytest $(ARGS) ) \
			|| failed="$$failed $$version"; \
	done; \
	if [ -n "$$failed" ]; then echo "failed under Python$$failed" >&2; exit 1; fi

.PHONY: pyz
pyz: ## build dist/roexec.pyz, the program in one file, and print its SHA-256
	$(PYTHON) zipapp/build.py $(PYTHONS)

dist/roexec.pyz: roexec.py LICENSE zipapp/build.py zipapp/__main__.py
	$(PYTHON) zipapp/build.py $(PYTHONS)

.PHONY: dist
dist: ## build the release, a .tar.gz around roexec.pyz; sdist and wheel where `build` is there
	$(PYTHON) zipapp/build.py --release $(PYTHONS)
	@if $(PYTHON) -c 'import build, setuptools as s; assert int(s.__version__.split(".")[0]) > 76' \
			2>/dev/null; \
		then $(PYTHON) -m build --no-isolation --outdir dist .; \
		else echo "no sdist and wheel: $(PYTHON) lacks build, or setuptools from 77 on"; fi

.PHONY: reference
reference: ## write the README's reference of commands anew
	$(PYTHON) tests/reference.py

.PHONY: bench
bench: ## measure; fails where a stated ratio is missed
	$(PYTHON) tests/bench/run.py

.PHONY: soak
soak: ## run the tests again and again, then torment nodes, for SOAK_MINUTES (10) each
	@end=$$(($$(date +%s) + 60 * $${SOAK_MINUTES:-10})); \
	while [ $$(date +%s) -lt $$end ]; do $(MAKE) --no-print-directory test || exit 1; done
	@ROEXEC_LONG=1 $(MAKE) --no-print-directory test ARGS="-s tests/test_nodes.py -k whatever_fails"

.PHONY: install
install: dist/roexec.pyz ## put the program into /usr/local/bin, or PREFIX/bin, as roexec
	mkdir -p "$(DESTDIR)$(PREFIX)/bin"
	cp dist/roexec.pyz "$(DESTDIR)$(PREFIX)/bin/.roexec.new"
	chmod 755 "$(DESTDIR)$(PREFIX)/bin/.roexec.new"
	mv -f "$(DESTDIR)$(PREFIX)/bin/.roexec.new" "$(DESTDIR)$(PREFIX)/bin/roexec"

.PHONY: clean
clean: ## remove what the other targets have made
	rm -rf dist build *.egg-info .venv .venvs .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
