PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := .venv-demo

.PHONY: demo test zoo format docs test-wheel test-oldest test-newest clean

demo: $(DEMO)/ready  ## Fine-tune a pretrained network with and without stochastic depth.
	$(DEMO)/bin/stochastic-depth finetune

test: $(VENV)/ready  ## Everything that CI checks.
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses auto --dist worksteal

zoo: $(VENV)/ready  ## The long sweeps over whole model zoos.
	$(BIN)/pytest -m zoo

format: $(VENV)/ready
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

docs: $(VENV)/docs  ## The documentation site, into build/docs; warnings are errors.
	$(BIN)/sphinx-build --fail-on-warning --keep-going -b html docs build/docs

clean:
	rm -rf $(VENV) $(VENV)-* build dist

# What the demo runs and nothing else.
$(DEMO)/ready: pyproject.toml constraints.txt
	@echo "Installing what the demo runs into $(DEMO) ..."
	@$(PYTHON) -m venv $(DEMO)
	@$(DEMO)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[cli]'
	@touch $@

# pip must know dependency groups (25.1), which the one that Python brings may not.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[cli]' --group dev
	touch $@

$(VENV)/docs: $(VENV)/ready
	$(BIN)/pip install --quiet --constraint constraints.txt --group docs
	touch $@
