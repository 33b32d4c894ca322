# `make demo`, `make chat` and `make test` do everything on a fresh machine, the virtual
# environment included.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: demo chat test lint stress bench quality models docs clean

demo: $(VENV)/.installed
	$(BIN)/python examples/quickstart_llamaindex.py

# Prints the address; CHAT="my_files/ --model NAME" answers from other files.
chat: $(VENV)/.chat
	$(BIN)/python examples/chatbot_llamaindex.py $(CHAT)

test: $(VENV)/.installed lint
	$(BIN)/python -m pytest -q

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

stress: $(VENV)/.installed
	$(BIN)/python -m pytest -q -m stress

bench: $(VENV)/.installed
	$(BIN)/ape-integrations bench

# Answers again what docs/quality.md reports; fails where a mean leaves its interval.
quality: $(VENV)/.installed
	$(BIN)/ape-integrations eval --check docs/quality.json
	$(BIN)/ape-integrations eval --check docs/quality-hard.json

docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

models: $(VENV)/.installed
	$(BIN)/python tools/support_matrix.py

# torch comes first: an installed version is kept, whatever a later range would admit.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test]"
	touch $@

# No more than the chatbots need; a full installation has that too.
$(VENV)/.chat: pyproject.toml constraints.txt
	test -e $(VENV)/.installed || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[chat]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
