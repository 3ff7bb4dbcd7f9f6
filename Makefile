PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: setup demo test coverage kill fuzz figures clean

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	# Without what these two ask for: an older numpy, for Python that is not used, and TensorRT itself.
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps nvidia-pytriton tensorrt-stubs
	# An older runtime, in a folder of its own, in which the tests run graphs for it.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target .venv/onnxruntime-1.20 onnxruntime==1.20.1
	touch $@

demo: setup
	$(BIN)/python quant/ptq.py

# worksteal: each process has its own files, whose fixtures are made once, and helps the other at the end.
test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist worksteal

# The tests again, with the share of the statements that they run; tracing makes them slower.
coverage: setup
	$(BIN)/pytest -n 2 --dist worksteal --cov --cov-report=
	@echo "coverage of illama, quant, deploy and eval: $$($(BIN)/coverage report --format=total)% of the statements"

# Kill train, build and ptq before each of their file operations (docs/reliability.md).
kill: setup
	$(BIN)/python tests/helpers/kill_harness.py --out results/kills

# Read N mutated files and command lines of every kind, drawn from SEED (docs/reliability.md).
N ?= 10000
SEED ?= 7
fuzz: setup
	PYTHONPATH=.:tests/helpers $(BIN)/python tests/fuzz/campaign.py --count $(N) --seed $(SEED) --out results/fuzz

# Every figure in README.md and docs/ printed again; ALL=1 for those of training runs too, which take hours.
figures: setup
	$(BIN)/python docs/figures.py $(if $(ALL),--all,--minutes 30)

clean:
	rm -rf .venv runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
