# Two commands do everything on a fresh machine: make demo, make test.
VENV ?= .venv
PYTHON ?= $(shell for p in python3.12 python3 python; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $$p && break; done)
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint clean

demo: $(INSTALLED)
	PYTHONWARNINGS=ignore $(VENV)/bin/python examples/demo.py

test: $(INSTALLED) lint
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(INSTALLED): setup.py pyproject.toml
	@test -n "$(PYTHON)" || { \
		echo "linear_moe needs Python 3.12 or newer, but python3 is $$(python3 --version 2>&1 || echo missing)."; \
		echo "Install it (pyenv install 3.12, apt install python3.12-venv, ...), or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12"; \
		exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null || { \
		echo "linear_moe needs Python 3.12 or newer, but PYTHON=$(PYTHON) is $$($(PYTHON) --version 2>&1)."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) demo
