# Two commands for a new user: `make demo` and `make test`. The other targets are the steps of CI (.ci/run).
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(shell command -v $(p) 2>/dev/null)))
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/demo
# Test processes; each needs about 3 GB.
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test nightly nightly-tests check lint types layers spelling ledger rehearsal rehearsal-grid mutants bench format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# One stamp per set of packages: installing again is quick when nothing changed.
$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("comtip-fast needs Python 3.11 or newer; set PYTHON=...") if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[demo]"
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

demo: $(VENV)/installed  ## build, train and evaluate: runs/demo/report.html (8 to 15 minutes on 2 cores)
	$(BIN)/comtip shards build data_shards/samples --out $(RUN)/shards --jobs 2 \
	  --tile-um 224 --tile-px 128 --min-mpp 4
	$(BIN)/comtip shards verify $(RUN)/shards
	$(BIN)/comtip pretrain --config configs/demo_cpu.yaml --out $(RUN) --resume --set data.shards=$(RUN)/shards
	$(BIN)/comtip evaluate $(RUN) --shards $(RUN)/shards --out $(RUN)
	@echo "open $(RUN)/report.html in a browser"

test: $(VENV)/installed-dev  ## all tests but those of nightly
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

nightly: nightly-tests rehearsal-grid mutants  ## slow tests, every combination of the rehearsal, and mutants; make -k nightly runs all parts even if one fails

nightly-tests: $(VENV)/installed-dev  ## tests that take minutes or need root or an S3 server: hosts whose links are cut, storage that fails
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[s3-test]"
	$(BIN)/python -m pytest -m nightly -s
	$(BIN)/python -m pytest tests/data_shards/test_s3.py

check: lint types layers spelling  ## all static checks

lint: $(VENV)/installed-dev  ## ruff, style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-dev  ## mypy
	$(BIN)/mypy

layers: $(VENV)/installed-dev  ## import rules between packages and layers
	PYTHONPATH=.:kernels:data_shards $(BIN)/lint-imports

spelling: $(VENV)/installed-dev  ## codespell
	$(BIN)/codespell $$(git ls-files)

ledger: $(VENV)/installed-dev  ## compile changed GPU kernels ahead of time and compare with bench/ledger.csv
	PYTHONPATH=kernels $(BIN)/python -m comtip_kernels.ledger --check $(LEDGER)

rehearsal: $(VENV)/installed-dev  ## walk GPU steps of every config on stand-in tensors and compare with bench/rehearsal.csv and graph_rules.csv
	PYTHONPATH=.:kernels:data_shards $(BIN)/python -m testkit.rehearsal --check $(REHEARSAL)

rehearsal-grid: $(VENV)/installed-dev  ## nightly: the ledger with the oldest and newest Triton, and walks of every combination of options (half an hour of CPU time)
	PYTHONPATH=kernels $(BIN)/python -m comtip_kernels.ledger --check --triton 3.6
	PYTHONPATH=kernels $(BIN)/python -m comtip_kernels.ledger --check --triton 3.9
	PYTHONPATH=.:kernels:data_shards $(BIN)/python -m testkit.rehearsal --check --all

mutants: $(VENV)/installed-dev  ## nightly: break every GPU kernel on purpose and require a failing test (an hour of CPU time)
	PYTHONPATH=.:kernels $(BIN)/python bench/kernels/mutate.py

bench: $(VENV)/installed-dev  ## microbenchmarks of the CPU kernels and their peers; fails if one is slower than bench/cpu_ratios.csv allows
	PYTHONPATH=bench/kernels $(BIN)/python -m pytest bench/kernels --benchmark-only --benchmark-max-time=0.2 \
	  --benchmark-min-rounds=3 --benchmark-columns=median,iqr,rounds --benchmark-sort=name
	PYTHONPATH=bench/kernels $(BIN)/python bench/kernels/cpu_ratios.py --check

format: $(VENV)/installed-dev  ## format the code with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove generated files
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
