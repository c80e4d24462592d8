# `make demo` and `make test` do everything on a fresh machine; both start with `setup`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   ?= demo
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONNOUSERSITE := 1

.PHONY: setup demo test lint soak clean
setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "Python 3.11 or newer is needed; this is %d.%d. Say which with: make PYTHON=python3.11 ..." % v[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (several GB; minutes on a first run)"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	@touch $@

demo: setup
	@rm -rf $(DEMO)
	@echo "--- six painted slides"
	@$(BIN)/engine synth $(DEMO)/slides --slides 6 --size 3072 --seed 0
	@echo "--- slides to a dataset"
	@$(BIN)/engine shard shard/tiny slides=$(DEMO)/slides out=$(DEMO)/dataset
	@echo "--- every byte checked, and one page about it"
	@$(BIN)/engine verify $(DEMO)/dataset
	@$(BIN)/engine report $(DEMO)/dataset
	@echo "--- ViTTM-HMR, tiny, on the dataset"
	@$(BIN)/engine train train/vittm_hmr_tiny dataset=$(DEMO)/dataset run=$(DEMO)/run steps=60
	@echo "--- its features of every patch, and what they know about the slides"
	@$(BIN)/engine extract extract/vittm_hmr dataset=$(DEMO)/dataset weights=$(DEMO)/run input_px=224 out=$(DEMO)/embeddings
	@$(BIN)/engine evaluate evaluate/tiny store=$(DEMO)/embeddings labels=$(DEMO)/slides/labels.csv
	@echo
	@echo "The loss at the start and at the end stand above; the run's every step is in $(DEMO)/run/metrics.jsonl."
	@echo "Look at:  $(DEMO)/slides/*.svs            the painted slides (any slide viewer)"
	@echo "          $(DEMO)/dataset/report.html     the dataset on one page (any browser)"
	@echo "          $(DEMO)/dataset/shards/*.tar    patches as WebDataset shards; index.parquet beside them"
	@echo "          $(DEMO)/run/                    checkpoints, metrics, TensorBoard"
	@echo "          $(DEMO)/embeddings/             one array of embeddings per slide (zarr)"

# As many test files side by side as there are cores, each process with one.
test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Long campaigns of the tests that kill and damage things, beyond what `make test` does.
soak: setup
	$(BIN)/pytest -m soak

clean:
	rm -rf $(VENV) $(DEMO) build dist *.egg-info
