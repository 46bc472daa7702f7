# make demo   sets up, generates real goods at once, then trains the embedded default from nothing
# make setup  the virtual environment alone
# make test   sets up and tests          make test-slow   the long tests       make test-gpu   those for a GPU
# make serve  the service and its web page on this machine, without keys
# make arena  every system that ships or stands in runs/, compared: out/arena/report.html
# make lint   format and lint            make bench-demo  quality of the demo over 100 prompts
# make gpu-report   tests, speed and goals on this machine's GPUs, one page      CPU=1   set-up without CUDA, under 2 GB
PYTHON ?= python3
VENV ?= .venv
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
RUN := $(VENV)/bin/python
# transparent huge pages and no trimming: convolutions on the CPU spend a third of their time in page faults otherwise
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=34359738368
export MALLOC_ARENA_MAX ?= 2
export PATH := $(abspath $(VENV))/bin:$(PATH)
# packages are installed without compiling them: what is imported is kept compiled, or each start compiles it again
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test test-slow test-gpu lint bench bench-demo gpu-report arena serve clean

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.txt
	@$(PYTHON) deploy/install.py $(VENV) requirements.txt $(if $(CPU),--cpu $(CPU_INDEX))
	@touch $@

demo: setup
	$(RUN) -m evaluation.demo

test: setup
	$(RUN) -m pytest -n auto --maxprocesses 8

test-slow: setup
	$(RUN) -m pytest -n auto --maxprocesses 2 --dist loadfile -m 'slow and not gpu'

test-gpu: setup
	$(RUN) -m pytest -m gpu

lint: setup
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .

bench-demo: setup
	$(RUN) -m benchmarks.quality.demo

bench: setup bench-demo
	for name in train_speed decode_speed tokenizer_speed ranker_speed; do $(RUN) -m benchmarks.$$name || exit 1; done

gpu-report: setup
	$(RUN) -m benchmarks.gpu_report

arena: setup
	$(RUN) -m evaluation.arena
	$(RUN) -m evaluation.arena_table out/arena

serve: setup
	$(RUN) -m serve --open

clean:
	rm -rf runs data out .cache
