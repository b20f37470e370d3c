PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := .venv-demo

.PHONY: demo test zoo third-party format docs test-wheel test-oldest test-newest clean

demo: $(DEMO)/ready  ## Fine-tune a pretrained network with and without stochastic depth.
	$(DEMO)/bin/stochastic-depth finetune

test: $(VENV)/ready  ## Everything that CI checks.
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest --numprocesses auto --dist worksteal

zoo: $(VENV)/ready  ## The long sweeps over whole model zoos.
	$(BIN)/pytest -m zoo

third-party: $(VENV)-third/ready  ## What is found in models of other packages, into docs/coverage.md.
	$(VENV)-third/bin/python -m tests.zoo third-party

format: $(VENV)/ready
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

docs: $(VENV)/docs  ## The documentation site, into build/docs; warnings are errors.
	$(BIN)/sphinx-build --fail-on-warning --keep-going -b html docs build/docs

test-wheel:  ## Build sdist and wheel into dist/, and use the wheel where torch is and nothing else.
	$(PYTHON) -m venv --clear $(VENV)-wheel
	$(VENV)-wheel/bin/pip install --quiet --constraint constraints.txt --upgrade pip
	$(VENV)-wheel/bin/pip wheel --quiet --no-deps --wheel-dir dist .
	$(VENV)-wheel/bin/pip install --quiet --constraint constraints.txt dist/stochastic_depth-*.whl
	cp tests/first_session.py $(VENV)-wheel/ && cd $(VENV)-wheel && bin/python -W error -W 'ignore:Failed to initialize NumPy' first_session.py
	cd $(VENV)-wheel && bin/stochastic-depth --version && bin/python -m stochastic_depth --version

# The tests that need torch alone, for the ends of what is promised.
CORE := tests/test_rates.py tests/test_rows.py tests/test_verify.py tests/test_residual.py \
	tests/test_layer.py tests/test_replay.py tests/test_rate_schedule.py tests/test_private_names.py \
	tests/find tests/faithful \
	$(addprefix --ignore=tests/,find/test_blocks_by_hand.py faithful/test_changes_after_apply.py \
	faithful/test_other_tracers.py faithful/test_reports.py)

test-oldest: TORCH ?= torch==2.13.*
test-newest: TORCH ?= torch
test-oldest test-newest: test-%:  ## The core tests with the oldest torch promised, and the newest there is.
	$(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/bin/pip install --quiet '$(TORCH)' --editable . numpy 'pytest>=9' pytest-timeout hypothesis scipy
	$(VENV)-$*/bin/pytest $(CORE)

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

# The packages without what they depend on, some of which would bring a torch of their own.
$(VENV)-third/ready: tests/zoo/third_party.txt constraints.txt
	$(PYTHON) -m venv $(VENV)-third
	$(VENV)-third/bin/pip install --quiet --constraint constraints.txt --editable '.[cli]'
	$(VENV)-third/bin/pip install --quiet --no-deps --requirement $<
	touch $@

$(VENV)/docs: $(VENV)/ready
	$(BIN)/pip install --quiet --constraint constraints.txt --group docs
	touch $@
