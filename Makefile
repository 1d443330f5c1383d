# make demo     set up, build; accuracy, tokens and speed of the trained checkpoint, pictures, throughput of DeiT-S: demo/
# make install  set up and build
# make test     the test suite's fast tier        make check   lint, format, types
# make test-full    all of it                     make oldest  the oldest supported versions, in a venv of their own
# make test-blas, make test-isa    the tests as other CPUs would run them
# make faults   faults planted one at a time (hours): the fast tier must find all that the full one finds
# make paper    train every variant on canvas (hours), and write docs/accuracy.md
# make aot      every Triton kernel, compiled without a GPU: registers, spills, instructions
# make sass     every CUDA kernel as it was compiled: registers, spills, instructions
# make emulate  the CUDA kernels on the host, thread for thread, under sanitizers: their tests without a GPU
# make gpu      on a machine with a GPU: build, test and measure there, with its own Python
# make bench    every op and model against torch  make report  tables and plots from the newest results
# make end-to-end   DeiT-S against every peer: compiled, OpenVINO, the same pruning in plain torch, EViT, ToMe
# make end-to-end-models   other sizes and resolutions against some of them
# make clean    remove what was built (not .venv)
#
# PYTHON and VENV may be set: `make demo PYTHON=python3.12 VENV=/somewhere/venv`.
# WORKERS, by default as many as there are cores, run the tests.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= $(shell nproc)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CSRC := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
RESULTS := benchmarks/results
GPU_RESULTS ?= $(RESULTS)

.PHONY: demo install test test-full test-blas test-isa faults oldest check aot sass emulate gpu gpu-build gpu-test gpu-test-cuda gpu-test-triton gpu-bench \
	gpu-end-to-end gpu-end-to-end-models gpu-end-to-end-autotuned bench end-to-end end-to-end-models report paper clean

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
	$(BIN)/sait bench --json demo/bench.json

PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test: install $(VENV)/.requirements-dev
	$(PYTEST)

test-full: install $(VENV)/.requirements-dev
	$(PYTEST) --full

# Each setting of tests/cpus.py in turn.
test-blas test-isa: install $(VENV)/.requirements-dev
	$(BIN)/python tests/cpus.py $(@:test-%=%) -n $(WORKERS) --dist loadfile

faults: install $(VENV)/.requirements-dev
	$(BIN)/python tests/plant_faults.py --workers $(WORKERS) --write tests/README.md

check: $(VENV)/.requirements-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CSRC) $(wildcard tests/emulation/*.h tests/emulation/*.cu)
	$(BIN)/mypy

aot: install
	TRITON_INTERPRET=0 $(BIN)/python benchmarks/aot.py

sass: install
	TRITON_INTERPRET=0 $(BIN)/python benchmarks/sass.py

# -O1 and -g: a sanitizer's report names lines. libstdc++ is loaded with libasan, which looks for it at its start.
EMULATED := $(patsubst csrc/cuda/%.cu,build/emulated/%.o,$(wildcard csrc/cuda/*.cu))
EMULATE_FLAGS := -std=c++20 -O1 -g -Wall -Wextra -Wno-unknown-pragmas -fPIC -fvisibility=hidden \
	-fsanitize=address,undefined -fno-sanitize-recover -DSAIT_EMULATE -Itests/emulation -Icsrc/include
SANITIZERS = $(shell $(CXX) -print-file-name=libasan.so):$(shell $(CXX) -print-file-name=libstdc++.so)

build/emulated/%.o: csrc/cuda/%.cu $(wildcard csrc/cuda/*.cuh csrc/include/sait/*.h tests/emulation/*.h) Makefile
	mkdir -p $(@D)
	$(CXX) $(EMULATE_FLAGS) -x c++ -c $< -o $@

emulate: $(EMULATED) $(VENV)/.requirements-dev
	SAIT_EMULATE=1 $(BIN)/python setup.py build_ext --inplace --build-temp build/emulated/library \
		--build-lib build/emulated/lib
	SAIT_EMULATED=1 LD_PRELOAD=$(SANITIZERS) ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=.:python \
		$(BIN)/python -m pytest tests/emulation tests/ops tests/test_properties.py -k "cuda or emul" -p no:cacheprovider

# On a machine with a GPU, whose own Python has torch, timm and what the tests need: nothing is installed. In
# parts, each of a few minutes; with pytest-xdist PYTEST_FLAGS="-n 8" compiles Triton's kernels side by side.
gpu: gpu-build gpu-test gpu-bench gpu-end-to-end

gpu-build:
	FORCE_CUDA=1 $(PYTHON) setup.py build_ext --inplace

gpu-test: gpu-test-cuda gpu-test-triton

GPU_PYTEST = PYTHONPATH=.:python SAIT_TEST_DEVICE=cuda $(PYTHON) -m pytest -p no:cacheprovider $(PYTEST_FLAGS)

gpu-test-cuda:
	$(GPU_PYTEST) tests/test_gpu.py tests/ops tests/test_properties.py tests/benchmarks/test_costs.py -k "cuda or gpu"

gpu-test-triton:
	$(GPU_PYTEST) tests/ops tests/test_properties.py -k triton

gpu-bench:
	PYTHONPATH=.:python $(PYTHON) -m pytest benchmarks -p no:cacheprovider --save-results $(GPU_RESULTS)
	PYTHONPATH=.:python $(PYTHON) benchmarks/overhead.py
	-PYTHONPATH=.:python $(PYTHON) benchmarks/traffic.py

GPU_END_TO_END = PYTHONPATH=.:python $(PYTHON) benchmarks/end_to_end.py --save-results $(GPU_RESULTS)
OTHER_MODELS := --model deit_tiny_patch16_224 --model deit_base_patch16_224 --model vit_large_patch16_224
OURS := --peer ours-dense --peer ours --peer ours-optimized-dense --peer ours-optimized

gpu-end-to-end:
	$(GPU_END_TO_END) $(ARGUMENTS)

# Commands of their own, with fewer peers and batches: torch.compile and its autotuning start anew with each of them.
gpu-end-to-end-models:
	$(GPU_END_TO_END) --part models --quick $(OTHER_MODELS) --model deit_base_patch16_384 --batch 1 --batch 64 \
		--peer timm-compiled --peer plain --peer evit --peer tome $(OURS) --peer ours-mass --peer ours-graphed-dense \
		--peer ours-graphed $(ARGUMENTS)

gpu-end-to-end-autotuned:
	$(GPU_END_TO_END) --part autotuned --max-autotune --batch 1 --batch 256 --peer timm-compiled $(OURS) \
		--peer ours-compiled --peer ours-graphed-dense --peer ours-graphed $(ARGUMENTS)

bench: install $(VENV)/.requirements-dev
	$(BIN)/python -m pytest benchmarks --save-results $(RESULTS)

# ARGUMENTS="--dtype bf16 --quick", or what else benchmarks/end_to_end.py --help says.
end-to-end: install $(VENV)/.requirements-dev
	$(BIN)/python benchmarks/end_to_end.py --save-results $(RESULTS) $(ARGUMENTS)

end-to-end-models: install $(VENV)/.requirements-dev
	$(BIN)/python benchmarks/end_to_end.py --save-results $(RESULTS) --part models --quick $(OTHER_MODELS) \
		--model vit_small_patch16_384 --batch 1 --batch 4 --peer openvino --peer plain $(OURS) $(ARGUMENTS)

report: $(VENV)/.requirements
	$(BIN)/python benchmarks/report.py

paper: install
	$(BIN)/python benchmarks/paper.py

clean:
	rm -rf build dist demo *.egg-info python/*.egg-info sait_kernels/*.so sait_kernels/_build_info.py $(VENV)/.build
