# Two commands do everything on a machine with Python 3.11 to 3.13 and make:
#   make demo    generate a small ListOps, train, test, report (no GPU needed)
#   make test    lint, types and the test suite
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-all test-gpu sanitize lint clean

demo: $(STAMP)
	rm -rf runs/demo
	$(BIN)/python run_lra.py prepare listops/smoke
	$(BIN)/python run_lra.py train listops/smoke attention=flash name=demo
	$(BIN)/python run_lra.py report runs/demo --out reports/demo
	@echo
	@echo "Data:    data/listops/"
	@echo "Run:     runs/demo/       (config.yaml, metrics.jsonl, result.json, checkpoints/)"
	@echo "Report:  reports/demo/index.html"

test: $(STAMP) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-all: $(STAMP) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m ''

# On a machine with a GPU: what tests/gpu/README.md describes.
test-gpu: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 8 --dist worksteal tests/gpu -k "not faults_are_noticed and not two_to_the_31"
	$(BIN)/python -m pytest -s tests/gpu -k "faults_are_noticed or two_to_the_31"

sanitize: $(STAMP)
	$(BIN)/python -m tests.gpu.sanitize

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"Python 3.11 to 3.13 is needed, {sys.executable} is {v[0]}.{v[1]}. Set PYTHON=/path/to/python3.11.")'
	$(PYTHON) -m venv $(VENV)
	# torch first: what depends on it must not pick another build.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[compile,slurm,dev]'
	@touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info
