# backtrack: the table of contents. `make help` lists the targets; every command can also be typed by hand.
#
#   make train-sft             the toy world of seed 0, from nothing to an answer that was taken back
#   make train-sft SEED=7      the same in another world
#
# Everything made lies under runs/ and is made once: delete a directory there to make it again. A run that was
# interrupted goes on where it was last saved.

SEED   ?= 0
RUN    := runs/toy-$(SEED)
VENV   ?= .venv
PYTHON ?= python3
PY     := $(VENV)/bin/python

# Seeds 0-9 were used to choose the settings below; results are reported on seeds from 100 up, and on those alone.
TEST_SEEDS ?= 100 101 102

BASE := --steps 700 --lr 4e-3 --batch-size 32 --max-length 128 --log-every 100
SFT  := --lr 1e-3 --batch-size 32 --max-length 128 --log-every 64
EPOCHS      := 6
# The baseline sees shorter sequences; with this many epochs it sees as many tokens as backtracking does in EPOCHS.
EPOCHS_LONG := 7
DPO  := --lr 5e-5 --beta 0.2 --nll 0.5 --epochs 2 --batch-size 32 --max-length 128 --log-every 10

.PHONY: help setup test test-slow lint train-base train-sft train-sft-baseline train-dpo train-dpo-baseline sample eval results bench
.DELETE_ON_ERROR:

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | awk -F'\t' '{ printf "  make %-20s %s\n", $$1, $$2 }'

# ── Set-up and checks ──────────────────────────────────────────────────────────────────────────────────────────────

setup: $(VENV)/.installed  ## install what is needed to train, sample and evaluate into .venv

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(PY) -m pip install --quiet -r requirements-dev.txt
	@touch $@

test: $(VENV)/.installed-dev  ## the test suite, a few minutes on 2 cores; installs transformers, the tests' oracle
	$(PY) -m pytest

test-slow: $(VENV)/.installed-dev  ## the checks that take longer, such as training the toy world
	$(PY) -m pytest -m slow

lint: $(VENV)/.installed-dev  ## ruff: style and common mistakes
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# ── The toy world: data, a pretrained base, fine-tuning with and without backtracking ──────────────────────────────

$(RUN)/data/world.json: $(VENV)/.installed
	$(PY) -m data.toy --seed $(SEED) --out $(RUN)/data

$(RUN)/base.done: $(RUN)/data/world.json
	$(PY) train.py base --config data/toy.json --tokenizer $(RUN)/data/tokenizer --data $(RUN)/data/base.jsonl \
		--out $(RUN)/base $(BASE) --seed $(SEED) --resume
	@touch $@

SFT_COMMAND = $(PY) train.py sft --init $(RUN)/base --data $(RUN)/data/sft.jsonl $(RUN)/data/replay.jsonl \
	--heldout $(RUN)/data/sft_heldout.jsonl $(SFT) --seed $(SEED) --resume

$(RUN)/sft.done: $(RUN)/base.done
	$(SFT_COMMAND) --out $(RUN)/sft --epochs $(EPOCHS)
	@touch $@

$(RUN)/sft-baseline.done: $(RUN)/base.done
	$(SFT_COMMAND) --out $(RUN)/sft-baseline --epochs $(EPOCHS) --no-backtrack
	@touch $@

$(RUN)/sft-baseline-long.done: $(RUN)/base.done
	$(SFT_COMMAND) --out $(RUN)/sft-baseline-long --epochs $(EPOCHS_LONG) --no-backtrack
	@touch $@

DPO_COMMAND = $(PY) train.py dpo --data $(RUN)/data/sft.jsonl --heldout $(RUN)/data/sft_heldout.jsonl $(DPO) \
	--seed $(SEED) --resume

$(RUN)/dpo.done: $(RUN)/sft.done
	$(DPO_COMMAND) --init $(RUN)/sft --out $(RUN)/dpo
	@touch $@

$(RUN)/dpo-baseline.done: $(RUN)/sft-baseline.done
	$(DPO_COMMAND) --init $(RUN)/sft-baseline --out $(RUN)/dpo-baseline --no-backtrack
	@touch $@

train-base: $(RUN)/base.done  ## pretrain a small Llama on the toy world: all recipes, no regard to safety

train-sft: $(RUN)/sft.done sample  ## from an empty machine to a model that backtracks, and a few of its answers

train-sft-baseline: $(RUN)/sft-baseline.done $(RUN)/sft-baseline-long.done  ## the same rows without backtracking: as many steps, and as many tokens

train-dpo: $(RUN)/dpo.done  ## preference optimisation on top of train-sft

train-dpo-baseline: $(RUN)/dpo-baseline.done  ## the same without backtracking, on top of train-sft-baseline

sample: $(RUN)/sft.done  ## answers of the toy model, what it took back struck through like ~~this~~
	@while IFS='	' read -r kind prompt prefill; do \
		printf '\n[%s] %s\n' "$$kind" "$$prompt"; \
		if [ -n "$$prefill" ]; then printf 'answer forced to begin: %s\n' "$$prefill"; fi; \
		$(PY) sample.py --ckpt $(RUN)/sft --prompt "$$prompt" --prefill "$$prefill" --show-discarded || exit 1; \
	done < $(RUN)/data/demo.tsv
	@printf '\nYour turn: %s sample.py --ckpt %s\n' $(PY) $(RUN)/sft

# ── What it buys and what it costs ─────────────────────────────────────────────────────────────────────────────────

$(RUN)/eval.json: $(RUN)/sft.done $(RUN)/sft-baseline.done $(RUN)/sft-baseline-long.done
	$(PY) -m backtrack.evaluate --ckpt $(RUN)/sft-baseline $(RUN)/sft-baseline-long $(RUN)/sft \
		--prompts $(RUN)/data/prompts.jsonl --judge $(RUN)/data/world.json --out $@

eval: $(RUN)/eval.json  ## unsafe, helpful, refused and reset rates of the toy models, with intervals
	$(PY) -m backtrack.evaluate --merge $(RUN)/eval.json

results:  ## the README's table: make eval on every test seed, pooled
	for seed in $(TEST_SEEDS); do $(MAKE) eval SEED=$$seed || exit 1; done
	$(PY) -m backtrack.evaluate --merge $(TEST_SEEDS:%=runs/toy-%/eval.json) --out results/toy-sft.json

bench: $(VENV)/.installed-dev  ## tokens per second against transformers, and what a reset costs
	$(PY) -m backtrack.bench
