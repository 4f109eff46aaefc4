# `make demo` and `make test` do all set-up themselves; everything lives in $(VENV).
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: demo test emulated avx512 frameworks bench clean

demo: $(VENV)/installed
	$(RUN) examples/split_images.py --out split-images

test: $(VENV)/installed
	$(RUN) -m spg_kernels
	$(RUN) -m pytest -n auto --maxprocesses 8 --dist worksteal tests
	$(RUN) -m bench.report --check

emulated: $(VENV)/installed
	PTX_EVERYTHING=1 PTX_ARCHITECTURES=80,90 $(RUN) -m pytest -n auto --maxprocesses 8 tests/ptx

avx512:
	tests/avx512/run.sh

frameworks: $(VENV)/frameworks
	$(RUN) -m pytest -n auto --maxprocesses 8 tests/frameworks

bench: $(VENV)/installed
	$(RUN) -m pytest bench --record
	$(RUN) -m bench.report

$(VENV)/installed: setup.py pyproject.toml constraints.txt $(wildcard csrc/*)
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[demo,test,triton]'
	touch $@

$(VENV)/frameworks: $(VENV)/installed
	$(RUN) -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[frameworks,test]'
	touch $@

clean:
	rm -rf $(VENV) build spg_kernels/backends/*.so *.egg-info
