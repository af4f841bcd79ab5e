# backtrack: the table of contents. `make help` lists the targets; every command can be typed by hand.
#
#   make train-sft             the toy world of seed 0, from nothing to an answer that was taken back
#   make train-sft SEED=7      the same in another world
#
# What is made lies under runs/ and is made once: delete a directory there to make it again. A run that
# was interrupted goes on where it was last saved. The experiments are in results/.

SEED   ?= 0
RUNS   ?= runs$(if $(QUICK),/quick)
VENV   ?= .venv
PYTHON ?= python3
PY     := $(VENV)/bin/python
RUN    := $(RUNS)/toy-$(SEED)

# The toy's matrices are small: two threads are enough. A thread that waits spins for a moment only. Without
# any spinning a quiet machine is slower; with as much as OpenMP's default a busy one hardly moves.
# Results differ in the last bits with the number of threads.
THREADS ?= 2
TOY     := OMP_NUM_THREADS=$(THREADS) GOMP_SPINCOUNT=10000
# PyTorch asks Linux for huge pages. Fresh memory is cleared page by page, which took a quarter of Gemma's training.
export THP_MEM_ALLOC_ENABLE ?= 1

BASE   := --steps 1200 --lr 3e-3 --batch-size 16 --max-length 128 --log-every 50
# 586 steps are six times through the rows.
SFT    := --lr 1e-3 --batch-size 32 --max-length 128 --log-every 50
STEPS  := 586
# Each side has the settings that did best for it of those tried on development seeds: results/tuning.md.
# Without restart pairs ours refuses more; at full weight they unlearn the reset.
SFT_OURS     := --reset-weight 4
SFT_BASELINE := --lr 5e-4 --method baseline
DPO          := --epochs 2 --batch-size 32 --max-length 128 --log-every 10
DPO_PAPER    := --beta 0.1 --lr 5e-5 --nll 0.2
DPO_OURS     := $(DPO_PAPER) --restart all --restart-weight 0.1
DPO_BASELINE := --beta 0.2 --lr 2e-4 --nll 1 --method baseline

.PHONY: help setup test test-slow test-gpu test-real train-base train-sft train-sft-baseline train-dpo \
	train-dpo-baseline sample
.DELETE_ON_ERROR:
.SECONDARY:

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' \
		| awk -F'\t' '{ printf "  make %-20s %s\n", $$1, $$2 }'

# ── Set-up and checks ──────────────────────────────────────────────────────────────────────────────

setup: $(VENV)/.installed  ## install what is needed to train, sample and evaluate into .venv

$(VENV)/.installed: requirements.txt
	@echo 'Installing torch and five small packages. On Linux that is the CUDA build, several GB:'
	@echo 'for the small CPU build stop here and see requirements.txt.'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --progress-bar on -r requirements.txt
	@touch $@

$(VENV)/.installed-%: requirements-%.txt $(VENV)/.installed
	$(PY) -m pip install --quiet -r $<
	@touch $@

$(VENV)/.installed-dev: requirements-figures.txt requirements-real.txt

test: $(VENV)/.installed-dev  ## the test suite; installs transformers, the tests' oracle
	$(PY) -m pytest

test-gpu: $(VENV)/.installed-dev  ## what needs a CUDA device
	$(PY) -m pytest -m gpu

test-slow: $(VENV)/.installed-dev  ## the checks that take minutes, such as training the toy world
	$(PY) -m pytest -m slow

test-real: $(VENV)/.installed-dev runs/smollm2/model.safetensors runs/gemma3-270m/model.safetensors  ## real models against transformers; downloads 346 MB once
	SMOLLM2=runs/smollm2 GEMMA3=runs/gemma3-270m $(PY) -m pytest -m real

# ── The toy world: data, a pretrained base, fine-tuning with and without backtracking ──────────────
# In the rules below % is the seed and $(@D) its directory; in those of results/tuning.mk % is something else.
SEED_OF = $(patsubst toy-%,%,$(notdir $(@D)))

$(RUNS)/toy-%/data/world.json: | $(VENV)/.installed
	$(PY) -m data.toy --seed $* --out $(@D)

$(RUNS)/toy-%/base.done: $(RUNS)/toy-%/data/world.json
	$(TOY) $(PY) -m data.base --config data/toy.json --tokenizer $(@D)/data/tokenizer \
		--data $(@D)/data/base.jsonl --out $(@D)/base $(BASE) --seed $* --resume
	@touch $@

SFT_COMMAND = $(TOY) $(PY) train.py sft --init $(@D)/base \
	--data $(@D)/data/sft.jsonl $(@D)/data/replay.jsonl --heldout $(@D)/data/sft_heldout.jsonl \
	$(SFT) --seed $(SEED_OF) --resume --out $(basename $@) --steps

$(RUNS)/toy-%/sft.done: $(RUNS)/toy-%/base.done
	$(SFT_COMMAND) $(STEPS) $(SFT_OURS)
	@touch $@

$(RUNS)/toy-%/sft-baseline.done: $(RUNS)/toy-%/base.done
	$(SFT_COMMAND) $(STEPS) $(SFT_BASELINE)
	@touch $@

DPO_COMMAND = $(TOY) $(PY) train.py dpo --data $(@D)/data/sft.jsonl \
	--heldout $(@D)/data/sft_heldout.jsonl $(DPO) --seed $(SEED_OF) --resume --out $(basename $@)

$(RUNS)/toy-%/dpo.done: $(RUNS)/toy-%/sft.done
	$(DPO_COMMAND) --init $(@D)/sft $(DPO_OURS)
	@touch $@

$(RUNS)/toy-%/dpo-baseline.done: $(RUNS)/toy-%/sft-baseline.done
	$(DPO_COMMAND) --init $(@D)/sft-baseline $(DPO_BASELINE)
	@touch $@

train-base: $(RUN)/base.done  ## pretrain a small Llama on the toy world: all recipes, no regard to safety

train-sft: $(RUN)/sft.done sample  ## from nothing to a model that backtracks, and a few of its answers
	@printf 'Its curves: pip install matplotlib, then %s -m backtrack.report curves %s/sft --out curves.png\n' $(PY) $(RUN)

train-sft-baseline: $(RUN)/sft-baseline.done  ## the same rows without backtracking

train-dpo: $(RUN)/dpo.done  ## preference optimisation on top of train-sft

train-dpo-baseline: $(RUN)/dpo-baseline.done  ## the same without backtracking

sample: $(RUN)/sft.done  ## answers of the toy model, what it took back struck through like ~~this~~
	@echo 'A made-up world of potions, in single turns: ask for a recipe ("Hello" is no question here).'
	@while IFS='	' read -r kind prompt prefill; do \
		printf '\n[%s] %s\n' "$$kind" "$$prompt"; \
		if [ -n "$$prefill" ]; then printf 'answer forced to begin: %s\n' "$$prefill"; fi; \
		$(PY) sample.py --ckpt $(RUN)/sft --prompt "$$prompt" --prefill "$$prefill" --show-discarded --slow || exit 1; \
	done < $(RUN)/data/demo.tsv
	@printf '\nYour turn: %s sample.py --ckpt %s\n' $(PY) $(RUN)/sft

include tests/checks.mk
include results/experiments.mk
include results/tuning.mk
include results/real.mk
