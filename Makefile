# make run | test | lint | results | bench | fault | clean. Needs python3 >= 3.11 and make; everything else goes to .venv,
# for `make bench`, which compares with TRL, to .venv-bench.
PYTHON ?= python3
PY = .venv/bin/python
LINT = E,F,W,B,UP --ignore B905

run: .venv/installed
	$(PY) gcpo.py $(or $(ARGS),$(if $(wildcard runs/gcpo-tiny-gcpo-s0),--out runs/gcpo-$(shell date +%Y%m%d-%H%M%S)))

test: .venv/installed
	$(PY) -m pytest -q tests $(ARGS)

lint: .venv/installed
	$(PY) -m ruff check --line-length 100 --select $(LINT) *.py tests benchmarks tiny

results: .venv/installed
	$(PY) benchmarks/reproduce.py $(ARGS)

fault: .venv/installed
	$(PY) benchmarks/fault.py $(ARGS)

bench: .venv-bench/installed
	.venv-bench/bin/python benchmarks/speed.py $(ARGS)

.venv-bench/installed: MORE = trl

.venv/installed .venv-bench/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("python3 >= 3.11 is needed" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet -r requirements.txt $(MORE)
	touch $@

clean:
	rm -rf .venv .venv-bench .pytest_cache .ruff_cache __pycache__ */__pycache__

.PHONY: run test lint results bench fault clean
