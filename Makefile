# All that a fresh machine needs is make and Python 3.11 to 3.14: `make run`, `make test`, `make check`, `make bench`.
# Packages go to .venv, and uv to .tools unless it is installed. `make clean` removes both and keeps .data.

.PHONY: run test faults engines clients open-webui librechat check openapi bench bench-quick lock clean
.DELETE_ON_ERROR:

# Ignore an active environment, which may be broken; and let uv use the installed Python.
unexport VIRTUAL_ENV CONDA_PREFIX PYTHONHOME
# Some images set this; then every process compiles every file again, a tenth of the cost of the tests.
unexport PYTHONDONTWRITEBYTECODE
export UV_PYTHON_DOWNLOADS := never

# Service users often have no home to keep uv's cache in.
ifeq ($(shell test -w "$$HOME" && echo yes),)
export UV_CACHE_DIR ?= $(CURDIR)/.tools/cache
endif

# The newest Python that fits. Each is run, not only looked for: version managers put names on PATH that do not work.
# Set with =, hence evaluated in the few recipes that use them, and not by every `make run`.
FITS := import sys; print(sys.executable) if (3, 11) <= sys.version_info[:2] <= (3, 14) else sys.exit(1)
PYTHON ?= $(shell for name in python3.14 python3.13 python3.12 python3.11 python3 python; do \
	$$name -c '$(FITS)' 2>/dev/null && break; done)
UV = $(shell uv --version >/dev/null 2>&1 && echo uv || echo .tools/bin/uv)
# Leaves out uv's lines about small packages.
SHOW_INSTALLING = /^ ([-+~]|  Downloaded) / { next } /^not-installed$$/ { exit 1 } { print "  " $$0; fflush() }
COMPILE = $(UV) pip compile --quiet --universal --generate-hashes --no-header \
	--python-version 3.11 pyproject.toml

run: .venv/synced
	@trap '' INT; exec .venv/bin/python -m app serve

# Most tests wait for something, so three files run at a time, each group on servers of its own. In the order of tests/conftest.py
# the long files come first and the short unit tests last; xdist's own order ends with files of few tests, which are long.
test: .venv/synced
	.venv/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# The fault suite and random faults in turns, with different timing each time: make faults SECONDS=3600
SECONDS ?= 600
faults: .venv/synced
	.venv/bin/python -m tests.faults.repeat --seconds $(SECONDS)

# Real engines with a tiny random model: prints what works with which, and writes it to docs/engines.md.
engines: .venv/synced .engines/made
	.venv/bin/python -m tests.engines

# Real clients, as docs/clients.md connects them. Needs Node.js and npm.
clients: .venv/synced .clients/made .clients/llama-index/made
	.venv/bin/python -m tests.clients

# Others, which take 7 GB and half a GB.
open-webui: .venv/synced .clients/open-webui/made
	.venv/bin/python -m tests.clients --only open-webui

librechat: .venv/synced .clients/librechat/made
	.venv/bin/python -m tests.clients --only librechat

check: .venv/synced
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/lint-imports

# The OpenAPI document, from the routes and the wire format; a test compares it with them.
openapi: .venv/synced
	.venv/bin/python -m app.api.openapi

# Measures on servers of its own; `bench` also draws the plots of docs/performance.md, and takes some ten minutes, `bench-quick` one or two.
bench: .venv/synced
	@.venv/bin/python -m tests.bench

bench-quick: .venv/synced
	@.venv/bin/python -m tests.bench --quick

# requirements.lock has the packages of a deployed server; requirements-dev.lock those, the embedded servers and the tools, in the
# same versions.
lock:
	@uv --version >/dev/null 2>&1 || $(MAKE) -s .tools/bin/uv
	$(COMPILE) -o requirements.lock
	$(COMPILE) --extra embedded --group dev -c requirements.lock -o requirements-dev.lock

clean:
	rm -rf .venv .tools .engines .clients .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .schemathesis

.venv/synced: requirements-dev.lock
	@uv --version >/dev/null 2>&1 || $(MAKE) -s .tools/bin/uv
	@.venv/bin/python -c '$(FITS)' >/dev/null 2>&1 || { $(need_python); $(UV) venv --quiet --clear --python "$$python" .venv; }
	@echo "Installing packages into .venv, Postgres and Valkey among them"
	@{ $(UV) pip sync --compile-bytecode --python .venv/bin/python --require-hashes requirements-dev.lock 2>&1 \
		|| echo not-installed; } | awk '$(SHOW_INSTALLING)'
	@$(write_command)
	@touch $@

# Torch may come without CUDA: from pip's folder of wheels (PIP_FIND_LINKS), or with UV_TORCH_BACKEND=cpu.
.engines/made: tests/engines/requirements.txt tests/engines/__init__.py tests/engines/weights.py | .venv/synced
	@$(UV) venv --quiet --clear --python .venv/bin/python .engines/venv
	UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" $(UV) pip install --quiet --python .engines/venv/bin/python -r $<
	.engines/venv/bin/python -m tests.engines.weights .engines/weights
	@touch $@

.clients/made: tests/clients/requirements.txt tests/clients/package.json | .venv/synced
	@$(UV) venv --quiet --clear --python .venv/bin/python .clients/venv
	$(UV) pip install --quiet --python .clients/venv/bin/python -r $<
	cp tests/clients/package.json .clients/
	npm install --prefix .clients --no-audit --no-fund --no-package-lock --loglevel error
	@touch $@

.clients/open-webui/made .clients/llama-index/made: .clients/%/made: tests/clients/%.txt | .venv/synced
	@$(UV) venv --quiet --clear --python .venv/bin/python .clients/$*
	$(UV) pip install --quiet --python .clients/$*/bin/python -r $<
	@touch $@

.clients/librechat/made: tests/clients/librechat.json | .venv/synced
	@mkdir -p .clients/librechat && cp $< .clients/librechat/package.json
	npm install --prefix .clients/librechat --no-audit --no-fund --no-package-lock --loglevel error
	@touch $@

.tools/bin/uv:
	@echo "uv is not installed: putting one into .tools"
	@$(need_python); export PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0; rm -rf .tools; \
	"$$python" -m pip install --quiet --target .tools 'uv==0.13.*' 2>/dev/null \
	|| { "$$python" -m venv --clear .tools/venv && .tools/venv/bin/python -m pip install --quiet 'uv==0.13.*' \
		&& mkdir .tools/bin && ln -s ../venv/bin/uv .tools/bin/uv; } >/dev/null \
	|| { echo "make: cannot get uv: install it, or give $$python pip or venv (Debian: python3-venv)" >&2; exit 1; }

# Shell fragments: $$python is the Python to use; and the command `reprise`, as an installed package would have it. Both it and
# `run` leave Ctrl-C to app/__main__.py, since Python prints a traceback until that is imported.
need_python = python="$(PYTHON)"; "$$python" -c '$(FITS)' >/dev/null 2>&1 \
	|| { echo "make: need Python 3.11 to 3.14; say which with PYTHON=/path/to/python" >&2; exit 1; }
define write_command
printf '#!/bin/sh\ntrap "" INT\nPYTHONPATH="%s" exec "%s/.venv/bin/python" -P -m app "$$@"\n' '$(CURDIR)' '$(CURDIR)' > .venv/bin/reprise \
	&& chmod +x .venv/bin/reprise
endef
