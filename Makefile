# Needs Python 3.11+ and make, nothing else.  PYTHON=… chooses the interpreter.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
DEMO   ?= out/demo
DATA   ?= ../shared/data/cxr
# Files of tests that run at a time.  Those that start a federation come first, and wait a lot.
JOBS   ?= 2

.PHONY: setup demo test test-long lint bench pictures clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 10

setup: $(VENV)/.ready  ## make .venv with everything in it

# A torch that the interpreter already has (a CUDA build, say) is kept, and its torchvision.
# By the names that pip knows them by: torch.__version__ may say +cu130 where the wheel does not.
$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11; give PYTHON=/path/to/a/newer/python"; exit 2; }
	@if $(PYTHON) -c 'import torch, torchvision' 2>/dev/null; then \
	    echo "keeping the installed torch"; \
	    $(PYTHON) -m venv --system-site-packages $(VENV); \
	    $(PYTHON) -c 'from importlib.metadata import version as v; print("torch==" + v("torch"), "torchvision==" + v("torchvision"), sep="\n")' > $(VENV)/constraints.txt; \
	  else \
	    $(PYTHON) -m venv $(VENV); : > $(VENV)/constraints.txt; \
	  fi
	@echo "installing into $(VENV) (some GB, some minutes)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c $(VENV)/constraints.txt -e '.[dev,bench]'
	@$(BIN)/python -c 'import torch, torchvision, timm' || { echo "error: torch and torchvision do not fit each other; install a matching pair (pytorch.org), then: rm -r $(VENV) && make setup"; exit 2; }
	@touch $@

demo: setup  ## draw DICOM phantoms of four hospitals, federate them, report (about five minutes on two idle cores)
	@rm -rf $(DEMO)-phantoms $(DEMO)
	$(BIN)/chexfound phantom --sites 4 --patients 60 --out $(DEMO)-phantoms
	$(BIN)/chexfound-sim --data $(DEMO)-phantoms --recipe demo --out $(DEMO)

test: setup  ## all tests, the deployed federation included
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder

test-long: setup  ## the same, with 500 examples a property in place of 30
	CHEXFOUND_TESTS=long $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder

lint: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup  ## the benchmarks that need no run of one's own; DATA=… names labelled X-rays
	@test -d $(DATA) || { echo "error: no folder $(DATA); give DATA=, a folder with a manifest.csv (docs/data.md)"; exit 2; }
	$(BIN)/python benchmarks/hog_floor.py --data $(DATA)
	@echo "On a simulation's folder: benchmarks/hog_floor.py --run OUT, benchmarks/backbone_probe.py --run OUT"

pictures:  ## draw those of README and docs anew, the report's from out/demo (needs chromium)
	$(BIN)/python docs/draw_architecture.py
	@test -f $(DEMO)/report.html || { echo "error: no $(DEMO)/report.html; make demo first"; exit 2; }
	chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1100,900 --screenshot=docs/report.png $(DEMO)/report.html

clean:  ## remove .venv and what the demo wrote
	rm -rf $(VENV) $(DEMO) $(DEMO)-phantoms
