# make demo   train the digits baseline through papermill (builds .venv first)
# make demo-distillation   a teacher of the digits, then its student   make demo-downstream   from digits to letters
# make test   the tests                make test-slow   the cases left out there   make test-lowest   with the oldest packages allowed
# make lint   ruff over code and notebooks
# make lab    JupyterLab               make bench   every benchmark   make screenshots   those of the README
# make train PARAMS=params/cifar10_baseline.yaml SET="-p data_dir=/data/cifar10"   any recipe through papermill
PYTHON ?= python3
BIN := .venv/bin
SPREAD := -n logical --maxprocesses 4 --dist worksteal
PARAMS ?= params/digits_baseline.yaml
# Threads that wait do not spin, also where a notebook or test imports torch before workbench.
OMP_WAIT_POLICY ?= PASSIVE
export OMP_WAIT_POLICY

.PHONY: demo demo-distillation demo-downstream test test-slow test-lowest lab bench screenshots train venv lint

demo: venv
	$(BIN)/python -m workbench notebook notebooks/02_baseline.ipynb params/digits_baseline.yaml -p name=demo_digits

demo-distillation: venv
	$(BIN)/python -m workbench train params/digits_teacher.yaml -p name=demo_teacher
	$(BIN)/python -m workbench notebook notebooks/03_distillation.ipynb params/digits_distillation.yaml \
	  -p name=demo_student -p teacher=runs/demo_teacher-seed0

demo-downstream: venv
	$(BIN)/python -m workbench train params/digits_baseline.yaml -p name=demo_digits
	$(BIN)/python -m workbench train params/letters_downstream.yaml -p name=demo_letters_scratch -p weights=
	$(BIN)/python -m workbench notebook notebooks/04_downstream.ipynb params/letters_downstream.yaml \
	  -p name=demo_letters -p weights=runs/demo_digits-seed0

train: venv
	$(BIN)/python -m workbench notebook notebooks/02_baseline.ipynb $(PARAMS) $(SET)

test: venv
	$(BIN)/python -m pytest $(SPREAD)

test-slow: venv
	$(BIN)/python -m pytest $(SPREAD) -m slow

# 6 GB more: an environment with the lowest versions that pyproject.toml allows
test-lowest:
	$(PYTHON) -m venv .lowest
	.lowest/bin/python -m pip install --quiet uv
	.lowest/bin/uv pip install --quiet --python .lowest/bin/python --resolution lowest-direct -e '.[test]'
	.lowest/bin/python -m pytest $(SPREAD)

lint: venv
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

lab: venv
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/notebooks $(if $(filter 0,$(shell id -u)),--allow-root)

bench: venv
	for script in $(filter-out %/gpu_check.py %/reference_results.py,$(wildcard benchmarks/*.py)); do \
	  $(BIN)/python $$script || exit 1; done

screenshots: venv
	NOTEBOOK_SCREENSHOTS=notebooks/figures $(BIN)/python -m pytest -m slow \
	  tests/ui/test_browser_pages.py -k screenshot

# .venv/installed is newer than pyproject.toml exactly when the environment is up to date
venv: .venv/installed
.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "building .venv with PyTorch, about 6 GB, a few minutes ..."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet -e '.[test]'
	@touch $@
