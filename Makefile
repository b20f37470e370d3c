PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo test zoo format clean

demo: $(VENV)/ready  ## Fine-tune the embedded default with and without stochastic depth.
	$(BIN)/stochastic-depth finetune

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

clean:
	rm -rf $(VENV)

# pip must know dependency groups (25.1), which the one that Python brings may not.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[cli]' --group dev
	touch $@
