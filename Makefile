PYTHON ?= python3
BIN := .venv/bin
PIP_INSTALL := $(BIN)/pip --disable-pip-version-check --quiet install --no-compile

# else each process that a test starts would compile all modules that it imports
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check lint types size docs

demo: .venv/.ready
	$(BIN)/trilithon demo

# types are checked beside the tests, which is work for one core; what is wrong with them is said at the end
test: lint
	@said=$$(mktemp); $(BIN)/mypy > $$said 2>&1 & types=$$!; \
	$(BIN)/pytest -m "not gpu" -n auto --dist worksteal; tests=$$?; \
	wait $$types; types=$$?; cat $$said; rm -f $$said; exit $$((tests ? tests : types))

check: lint types size

lint: .venv/.ready
	$(BIN)/ruff format --check
	$(BIN)/ruff check

types: .venv/.ready
	$(BIN)/mypy

size: .venv/.ready
	$(BIN)/pytest tests/test_layers.py

docs: .venv/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# torch goes first and alone, without constraints, so that a machine set up for one build of it (CPU, CUDA) keeps that build.
# A build for CUDA brings its Triton; without one, Triton's interpreter runs the kernels in tests.
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP_INSTALL) torch==2.13.0
	$(PIP_INSTALL) -c constraints.txt -e '.[dev]'
	$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP_INSTALL) --no-deps triton==3.7.1
	touch $@
