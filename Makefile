PYTHON ?= python3
EK_REQUIRE_NATIVE ?= 1
WORKERS ?= auto
VENV := .venv
BIN := $(VENV)/bin
# Where torch comes from: a folder of TORCH_WHEELS such as cpu (190 MB), or the ordinary index if empty
# (2.7 GB on Linux, for CUDA). The environment remembers it.
TORCH ?= $(shell cat $(VENV)/.torch 2> /dev/null)
TORCH_WHEELS ?= https://download.pytorch.org/whl
VERL := .venv-verl
VERL_NEEDS := tests/integrations/verl-requirements.txt
VLLM := .venv-vllm
VLLM_NEEDS := tests/trainer/vllm-requirements.txt
comma := ,
INPUTS := pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard cmake/*.py csrc/*/*)
# Where nvcc is found, CUTLASS's headers come from a wheel, without its 11 dependencies.
NVCC := $(if $(filter 0,$(EK_CUDA)),,$(shell command -v $(or $(CUDACXX),nvcc)))
ifneq ($(NVCC),)
ifndef EK_CUTLASS_DIR
CUTLASS := build/cutlass/.installed
export EK_CUTLASS_DIR := $(CURDIR)/build/cutlass/cutlass_library/source/include
endif
endif
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: train real-model model-is-there test test-slow test-thorough test-builds test-compile test-cuda test-aarch64 test-verl test-vllm
.PHONY: test-wheel lint bench sanitize docs resolve clean FORCE

train: $(VENV)/.trainer
	@echo "Training ..."
	@$(BIN)/python -m trainer train $(ARGS)

# Tests of builds: wheels, csrc/ without Python. And kernels for every GPU, compiled ahead of time.
BUILDS := tests/test_wheel.py tests/test_cpp.py tests/test_cuda_build.py
COMPILED := tests/test_triton_compile.py
ORDINARY := $(patsubst %,--ignore=%,$(BUILDS) $(COMPILED) tests/cuda)
# Collecting all files takes longer than collecting these.
SLOW = $(sort $(shell grep -rl --include='test_*.py' 'mark\.slow' tests))

test: lint
	@echo "Running the tests ..."
	@EK_REQUIRE_NATIVE=$(EK_REQUIRE_NATIVE) $(BIN)/python -m pytest $(ORDINARY) \
		-m "not slow" --sampled -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

# Training runs of the studies and the planner, programs of several processes, examples, pins, kernels
# under the sanitizer, by models of hardware, and broken on purpose.
test-slow: $(VENV)/.dev
	@echo "Running the slow tests ..."
	@EK_REQUIRE_NATIVE=$(EK_REQUIRE_NATIVE) $(BIN)/python -m pytest -m slow --sampled $(SLOW) $(ARGS)

# Every test of the two, with all parameters of the large grids, of which the two run a share.
test-thorough: $(VENV)/.dev
	@echo "Running all tests with all their parameters ..."
	@EK_REQUIRE_NATIVE=$(EK_REQUIRE_NATIVE) $(BIN)/python -m pytest $(ORDINARY) \
		-n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-builds: $(VENV)/.dev
	@echo "Running the tests of what is built ..."
	@EK_REQUIRE_NATIVE=$(EK_REQUIRE_NATIVE) $(BIN)/python -m pytest $(BUILDS) $(ARGS)

# The text of csrc/cuda on the host, and what nvcc has made of it, if it is found.
test-cuda: $(VENV)/.dev
	@echo "Running the tests of csrc/cuda ..."
	@EK_REQUIRE_CUDA=$(if $(NVCC),1) $(BIN)/python -m pytest tests/cuda -n 2 $(ARGS)

# With the environment's Triton, or with another version of it. For all GPUs, or for those of pytest's -k.
TRITON ?=
GPUS ?=
test-compile: $(VENV)/.dev $(if $(TRITON),build/triton-$(TRITON)/.installed)
	@echo "Compiling the kernels for $(or $(GPUS),every GPU) with $(if $(TRITON),Triton $(TRITON),the pinned Triton) ..."
	@$(if $(TRITON),PYTHONPATH=build/triton-$(TRITON)) $(BIN)/python -m pytest $(COMPILED) $(if $(GPUS),-k "$(GPUS)") $(ARGS)

build/triton-%/.installed: | $(VENV)/.dev
	@echo "Installing Triton $* into build/triton-$* ..."
	@$(BIN)/python -m pip install -q --no-deps --upgrade --target build/triton-$* triton==$*
	@touch $@

# The kernels of aarch64, cross-compiled and run in an emulator, also under sanitizers. It fails if
# the cross-compiler or the emulator is missing.
test-aarch64: $(VENV)/.dev
	@echo "Running the tests of csrc/ for aarch64 in an emulator ..."
	@EK_REQUIRE_AARCH64=1 $(BIN)/python -m pytest tests/test_cpp.py -k aarch64 $(ARGS)

# In an environment of its own, on top of $(VENV).
test-verl: $(VERL)/.installed
	@echo "Running the tests of the adapter to verl, and of losses against its own ..."
	@$(VERL)/bin/python -m pytest tests/integrations/test_verl*.py tests/test_loss_parity.py $(ARGS)

# In an environment of its own. One thread, since two that share a core wait for each other. Without
# torch.compile, whose time vLLM's one compiled kernel is not worth here.
test-vllm: $(VLLM)/.installed
	@echo "Running the tests of the vLLM engine ..."
	@OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1 $(VLLM)/bin/python -m pytest tests/trainer/test_vllm*.py $(ARGS)

# The package's tests outside of the checkout, with a wheel that is built from an sdist.
test-wheel: $(VENV)/.dev
	@echo "Running the package's tests against an installed wheel ..."
	@EK_REQUIRE_NATIVE=$(EK_REQUIRE_NATIVE) $(BIN)/python -m tests.installed \
		-n $(WORKERS) --dist loadfile --no-loadscope-reorder -k "not triton" $(ARGS)

lint: $(VENV)/.dev
	@echo "Checking style and types ..."
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h) \
		$(wildcard tests/*.cpp tests/cpp/*.* tests/cuda/*.cpp tests/cuda/*.h)
	@$(BIN)/mypy

# Builds the site into build/site. A broken link or an unknown name fails it.
docs: $(VENV)/.dev
	@echo "Building the docs ..."
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

bench: $(VENV)/.dev
	@echo "Running the benchmarks ..."
	@$(BIN)/python -m pytest benchmarks/ --benchmark-only $(ARGS)

# RL, entropies and steps of a pretrained model; it says how long they take, and goes on where it ended.
MODEL ?=
real-model: model-is-there $(VENV)/.dev
	@$(BIN)/python -m benchmarks.real_model --model "$(MODEL)" $(ARGS)

model-is-there:
	@test -f "$(MODEL)/config.json" || \
		{ echo "MODEL must be the folder of a model with config.json; got '$(MODEL)'" >&2; exit 1; }

# Resolves, without installing, what a user's first command takes from the ordinary index.
resolve: $(VENV)/.dev
	@echo "Resolving what an installation takes from the ordinary index ..."
	@$(BIN)/python -m tests.resolution

# Runs the program of tests/cpp under sanitizers. Then runs a copy of the package and its tests of
# csrc/ with a module built under sanitizers, without the tests of other backends and of time.
SANITIZED := $(CURDIR)/build/sanitize
SANITIZED_TESTS := native native_rows native_ratio_loss native_linear_logprob_entropy \
	linear_logprob_entropy linear_logprob_entropy_cost linear_logprob_entropy_calls \
	head_statistics main_grad ratio_loss entropy_threshold top_entropy_mask streaming_threshold \
	high_entropy_policy_loss amx
SANITIZED_NAMES := not triton and not ctrl_c and not hundred_million and not time_is_linear
RUNTIMES = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libubsan.so)

# MAKEFLAGS is empty for ninja, which would not take part in make's jobs.
sanitize: $(VENV)/.dev
	@$(foreach file,$(RUNTIMES),test -f $(file) || \
		{ echo "$(CXX) has no $(file); CXX=g++ on Linux is wanted" >&2; exit 1; };)
	@echo "Building with AddressSanitizer and UndefinedBehaviorSanitizer ..."
	@mkdir -p $(SANITIZED)
	@PATH="$(abspath $(BIN)):$$PATH" cmake -G Ninja -S . -B $(SANITIZED)/cmake -DEK_SANITIZE=ON \
		-DEK_CPP_TESTS=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_COMPILER=$(CXX) \
		-DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(SANITIZED)/lib \
		-DPython_EXECUTABLE=$(abspath $(BIN))/python \
		-Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) > $(SANITIZED)/configure.log
	@MAKEFLAGS= PATH="$(abspath $(BIN)):$$PATH" cmake --build $(SANITIZED)/cmake
	@UBSAN_OPTIONS=print_stacktrace=1 $(SANITIZED)/cmake/cpu_tests
	@rm -rf $(SANITIZED)/tree
	@mkdir -p $(SANITIZED)/tree
	@cp -R entropy_kernels tests pyproject.toml $(SANITIZED)/tree
	@rm -f $(SANITIZED)/tree/entropy_kernels/*.so
	@cp $(SANITIZED)/lib/_cpu*.so $(SANITIZED)/tree/entropy_kernels
	@echo "Running the tests of csrc/ under them ..."
	@cd $(SANITIZED)/tree && LD_PRELOAD="$(RUNTIMES)" EK_REQUIRE_NATIVE=1 EK_TEST_IMPLS=cpu \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		$(abspath $(BIN))/python -m pytest --capture=sys -k "$(SANITIZED_NAMES)" \
		$(SANITIZED_TESTS:%=tests/test_%.py) $(ARGS)

clean:
	@echo "Removing $(VENV), $(VERL), $(VLLM), build outputs and caches; runs/ stays ..."
	@rm -rf $(VENV) $(VERL) $(VLLM) build dist *.egg-info entropy_kernels/*.so entropy_kernels/*_not_built.txt
	@rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@command -v $(PYTHON) > /dev/null || \
		{ echo "PYTHON=$(PYTHON) is not found; Python 3.10 or newer is wanted" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "PYTHON=$(PYTHON) is $$($(PYTHON) --version 2>&1); 3.10 or newer is wanted" >&2; exit 1; }
	@echo "Creating $(VENV) ..."
	@$(PYTHON) -m venv --clear $(VENV)
	@echo '$(TORCH)' > $(VENV)/.torch
	@touch $@

# A TORCH that differs from the environment's makes it anew.
ifneq ($(strip $(TORCH)),$(shell cat $(VENV)/.torch 2> /dev/null))
$(VENV)/.created: FORCE
endif

define install
	@echo "Installing .[$(1)] into $(VENV), with $(or $(TORCH),the ordinary index)'s torch ..."
	@$(if $(TORCH),,echo "(on Linux that downloads 2.7 GB for CUDA; TORCH=cpu takes 190 MB)")
	@$(BIN)/python -m pip install -q $(if $(TORCH),--extra-index-url $(TORCH_WHEELS)/$(TORCH)) \
		-c constraints.txt -e ".[$(1)]"
	@$(BIN)/python -c 'from entropy_kernels._extensions import load; \
		[print(load(x)[1] or f"Built entropy_kernels._{x}.") for x in ("cpu", "cuda")]'
	@touch $(VENV)/.trainer $@
endef

build/cutlass/.installed: cmake/cuda_toolkit.py | $(VENV)/.created
	@echo "Installing CUTLASS's headers into build/cutlass ..."
	@$(BIN)/python -m pip install -q --no-deps --upgrade --target build/cutlass \
		$$(sed -n 's/^CUTLASS = "\(.*\)"/\1/p' $<)
	@touch $@

$(VENV)/.trainer: $(VENV)/.created $(INPUTS) | $(CUTLASS)
	$(call install,trainer)

$(VENV)/.dev: $(VENV)/.created $(INPUTS) | $(CUTLASS)
	$(call install,trainer$(comma)gym$(comma)integrations$(comma)dev$(comma)docs)

# Makes the environment $(1) on top of $(VENV), with the packages of $(2).
define on_top
	@echo "Installing $(notdir $(2)) into $(1) ..."
	@rm -rf $(1)
	@$(BIN)/python -m venv $(1)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth
	@$(1)/bin/python -m pip install -q --no-deps -r $(2)
	@touch $@
endef

$(VERL)/.installed: $(VENV)/.dev $(VERL_NEEDS)
	$(call on_top,$(VERL),$(VERL_NEEDS))

$(VLLM)/.installed: $(VENV)/.dev $(VLLM_NEEDS)
	$(call on_top,$(VLLM),$(VLLM_NEEDS))
