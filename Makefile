# backtrack: the table of contents. `make help` lists the targets; every command can also be typed by hand.
#
#   make train-sft             the toy world of seed 0, from nothing to an answer that was taken back
#   make train-sft SEED=7      the same in another world
#
# Everything made lies under runs/ and is made once: delete a directory there to make it again. A run that was
# interrupted goes on where it was last saved.

SEED   ?= 0
RUNS   ?= runs$(if $(QUICK),/quick)
VENV   ?= .venv
PYTHON ?= python3
PY     := $(VENV)/bin/python
# Trainings and evaluations of `make eval` that run side by side, each on one thread.
JOBS   ?= 2

# Seeds 0-9 were used to choose the settings below and 100-102 in an earlier report; results are of these, and of these
# alone.
ifdef QUICK
TEST_SEEDS  ?= 200
ATTACK_SEEDS ?= $(TEST_SEEDS)
TRAINING_SEEDS ?= $(TEST_SEEDS)
ATTACK_SIZE ?= --limit 3 --budget 256
BIAS_SIZE   ?= --limit 8
SAMPLE_SIZE ?= --limit 12
RESULTS     ?= $(RUNS)/results
EXPERIMENTS ?= main bias sampling
else
TEST_SEEDS  ?= 200 201 202 203 204
ATTACK_SEEDS ?= 200 201 202
TRAINING_SEEDS ?= 200 201 202
ATTACK_SIZE ?= --limit 6 --budget 1024
BIAS_SIZE   ?= --limit 32
SAMPLE_SIZE ?= --limit 48
RESULTS     ?= results
EXPERIMENTS ?= main bias sampling retry training
endif

BASE := --steps 700 --lr 4e-3 --batch-size 32 --max-length 128 --log-every 100
SFT  := --lr 1e-3 --batch-size 32 --max-length 128 --log-every 64
EPOCHS      := 6
# The baseline sees shorter sequences; with this many epochs it sees as many tokens as backtracking does in EPOCHS.
EPOCHS_LONG := 7
# Each side has the DPO settings that did best for it of those tried on development seeds (README: Tuning). Without
# restart pairs ours teaches to refuse harmless questions; at full weight they unlearn the reset.
DPO  := --beta 0.2 --epochs 2 --batch-size 32 --max-length 128 --log-every 10
DPO_PAPER    := --lr 5e-5 --nll 0.2
DPO_OURS     := $(DPO_PAPER) --restart all --restart-weight 0.1
DPO_BASELINE := --lr 2e-4 --nll 1 --no-backtrack

RUN := $(RUNS)/toy-$(SEED)

.PHONY: help setup test test-slow lint train-base train-sft train-sft-baseline train-dpo train-dpo-baseline sample \
	eval attack figures bench
.DELETE_ON_ERROR:
.SECONDARY:

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | awk -F'\t' '{ printf "  make %-20s %s\n", $$1, $$2 }'

# ── Set-up and checks ──────────────────────────────────────────────────────────────────────────────────────────────

setup: $(VENV)/.installed  ## install what is needed to train, sample and evaluate into .venv

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt requirements-figures.txt
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
# In the rules below % is the seed and $(@D) its directory.

$(RUNS)/toy-%/data/world.json: | $(VENV)/.installed
	$(PY) -m data.toy --seed $* --out $(@D)

$(RUNS)/toy-%/base.done: $(RUNS)/toy-%/data/world.json
	$(PY) train.py base --config data/toy.json --tokenizer $(@D)/data/tokenizer --data $(@D)/data/base.jsonl \
		--out $(@D)/base $(BASE) --seed $* --resume
	@touch $@

SFT_COMMAND = $(PY) train.py sft --init $(@D)/base --data $(@D)/data/sft.jsonl $(@D)/data/replay.jsonl \
	--heldout $(@D)/data/sft_heldout.jsonl $(SFT) --seed $* --resume --out $(basename $@)

$(RUNS)/toy-%/sft.done: $(RUNS)/toy-%/base.done
	$(SFT_COMMAND) --epochs $(EPOCHS)
	@touch $@

$(RUNS)/toy-%/sft-baseline.done: $(RUNS)/toy-%/base.done
	$(SFT_COMMAND) --epochs $(EPOCHS) --no-backtrack
	@touch $@

$(RUNS)/toy-%/sft-baseline-long.done: $(RUNS)/toy-%/base.done
	$(SFT_COMMAND) --epochs $(EPOCHS_LONG) --no-backtrack
	@touch $@

DPO_COMMAND = $(PY) train.py dpo --data $(@D)/data/sft.jsonl --heldout $(@D)/data/sft_heldout.jsonl $(DPO) \
	--seed $* --resume --out $(basename $@)

$(RUNS)/toy-%/dpo.done: $(RUNS)/toy-%/sft.done
	$(DPO_COMMAND) --init $(@D)/sft $(DPO_OURS)
	@touch $@

$(RUNS)/toy-%/dpo-baseline.done: $(RUNS)/toy-%/sft-baseline.done
	$(DPO_COMMAND) --init $(@D)/sft-baseline $(DPO_BASELINE)
	@touch $@

# What the paper leaves open, each a training of its own.

$(RUNS)/toy-%/dpo-from-baseline.done: $(RUNS)/toy-%/sft-baseline.done
	$(DPO_COMMAND) --init $(@D)/sft-baseline $(DPO_OURS)
	@touch $@

$(RUNS)/toy-%/dpo-paper.done: $(RUNS)/toy-%/sft.done
	$(DPO_COMMAND) --init $(@D)/sft $(DPO_PAPER)
	@touch $@

$(RUNS)/toy-%/sft-restart-unsafe.done: $(RUNS)/toy-%/base.done
	$(SFT_COMMAND) --epochs $(EPOCHS) --restart unsafe
	@touch $@

$(RUNS)/toy-%/sft-restart-all.done: $(RUNS)/toy-%/base.done
	$(SFT_COMMAND) --epochs $(EPOCHS) --restart all
	@touch $@

$(RUNS)/toy-%/sft-prefix-early.done: $(RUNS)/toy-%/base.done
	$(SFT_COMMAND) --epochs $(EPOCHS) --prefix 0 0.5
	@touch $@

$(RUNS)/toy-%/sft-prefix-late.done: $(RUNS)/toy-%/base.done
	$(SFT_COMMAND) --epochs $(EPOCHS) --prefix 0.5 1
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

# ── What it buys and what it costs: the paper's experiments, and what it leaves open ───────────────────────────────

EVAL = $(PY) -m backtrack.evaluate --prompts $(@D)/data/prompts.jsonl --judge $(@D)/data/world.json --out $@ \
	--ckpt $(patsubst %.done,%,$(filter %.done,$^))
FOUR := sft-baseline dpo-baseline sft dpo
UNSAFE_SETS := unseen unseen-ingredients wrapper
NEW_SETS    := $(UNSAFE_SETS) prefill-unseen benign-unseen benign-wrapper

# The main table.
$(RUNS)/toy-%/main.json: $(addprefix $(RUNS)/toy-%/,$(addsuffix .done,sft-baseline dpo-baseline sft-baseline-long sft dpo))
	$(EVAL)

# The dial: a bias on the logit of [RESET]. One prompt at a time, so that its times are a user's.
$(RUNS)/toy-%/bias.json: $(RUNS)/toy-%/sft.done $(RUNS)/toy-%/dpo.done
	$(EVAL) --sets $(UNSAFE_SETS) benign-unseen benign-wrapper $(BIAS_SIZE) --batch-size 1 --reset-bias -10 -5 -2 0 2 5 10

# Best and worst of k.
$(RUNS)/toy-%/sampling.json: $(addprefix $(RUNS)/toy-%/,$(addsuffix .done,$(FOUR)))
	$(EVAL) --sets unseen unseen-ingredients $(SAMPLE_SIZE) --temperature 1 --samples 64 --batch-size 256

# What the retry sees, and how many it gets.
$(RUNS)/toy-%/retry.json: $(RUNS)/toy-%/sft.done $(RUNS)/toy-%/dpo.done
	$(EVAL) --sets $(NEW_SETS) --on-reset truncate keep --max-resets 0 1 2 4

# Other ways to train.
$(RUNS)/toy-%/training.json: $(addprefix $(RUNS)/toy-%/,$(addsuffix .done,sft sft-restart-unsafe sft-restart-all \
		sft-prefix-early sft-prefix-late dpo dpo-paper dpo-from-baseline sft-baseline))
	$(EVAL) --sets $(NEW_SETS) --on-reset truncate keep

$(RESULTS)/toy-%.json: $(foreach seed,$(TEST_SEEDS),$(RUNS)/toy-$(seed)/%.json)
	$(PY) -m backtrack.evaluate --merge $^ --out $@

$(RESULTS)/toy-training.json: $(foreach seed,$(TRAINING_SEEDS),$(RUNS)/toy-$(seed)/training.json)
	$(PY) -m backtrack.evaluate --merge $^ --out $@

eval: $(VENV)/.installed  ## every experiment on the test seeds, pooled into results/; an hour. QUICK=1: one seed, minutes
	$(if $(QUICK),$(MAKE) $(TEST_SEEDS:%=$(RUNS)/toy-%/base.done))
	OMP_NUM_THREADS=1 $(MAKE) -j $(JOBS) $(EXPERIMENTS:%=$(RESULTS)/toy-%.json)

# ── Attacks ────────────────────────────────────────────────────────────────────────────────────────────────────────

# $(call attack,NAME,MODEL,FILE,OPTIONS)
define attack
	$(PY) -m backtrack.attacks $1 --ckpt $(@D)/$2 --prompts $(@D)/data/prompts.jsonl --sets unseen unseen-ingredients \
		--judge $(@D)/data/world.json --seed $* --out $(@D)/attacks/$3.jsonl $4 >/dev/null

endef
four = $(foreach model,$(FOUR),$(call attack,$1,$(model),$1-$(model),$2))

$(RUNS)/toy-%/attacked-easily.done: $(addprefix $(RUNS)/toy-%/,$(FOUR:=.done))
	$(call four,prefill,--limit 16)
	$(call four,instruct,--limit 16)
	@touch $@

# GCG and AutoDAN aim at an opening that says yes, as they do on AdvBench; the adaptive attacker at the whole answer.

$(RUNS)/toy-%/attacked-gcg.done: $(addprefix $(RUNS)/toy-%/,$(FOUR:=.done))
	$(call four,gcg,$(ATTACK_SIZE) --target-tokens 8)
	@touch $@

$(RUNS)/toy-%/attacked-adaptive-gcg.done: $(addprefix $(RUNS)/toy-%/,$(FOUR:=.done))
	$(call four,adaptive-gcg,$(ATTACK_SIZE))
	@touch $@

$(RUNS)/toy-%/attacked-autodan.done: $(addprefix $(RUNS)/toy-%/,$(FOUR:=.done))
	$(call four,autodan,$(ATTACK_SIZE) --target-tokens 8)
	@touch $@

# What the defender can still change against the adaptive attack.
$(RUNS)/toy-%/attacked-again.done: $(RUNS)/toy-%/dpo.done
	$(call attack,adaptive-gcg,dpo,adaptive-gcg-dpo-keep,$(ATTACK_SIZE) --on-reset keep)
	$(call attack,adaptive-gcg,dpo,adaptive-gcg-dpo-4-resets,$(ATTACK_SIZE) --max-resets 4)
	$(call attack,adaptive-gcg,dpo,adaptive-gcg-dpo-bias-5,$(ATTACK_SIZE) --reset-bias 5)
	@touch $@

ATTACKS := easily gcg adaptive-gcg autodan again

$(RESULTS)/toy-attacks.json: $(foreach seed,$(ATTACK_SEEDS),$(ATTACKS:%=$(RUNS)/toy-$(seed)/attacked-%.done))
	$(PY) -m backtrack.attacks table $(ATTACK_SEEDS:%=$(RUNS)/toy-%/attacks/*.jsonl) --out $@

attack: $(VENV)/.installed  ## the attacks on three test seeds, pooled into results/; a quarter of an hour after make eval
	OMP_NUM_THREADS=1 $(MAKE) -j $(JOBS) $(RESULTS)/toy-attacks.json

figures: $(VENV)/.installed-figures  ## the pictures of results/, from its JSON
	$(PY) -m backtrack.figures --results $(RESULTS)

$(VENV)/.installed-figures: $(VENV)/.installed requirements-figures.txt
	$(PY) -m pip install --quiet -r requirements-figures.txt
	@touch $@

bench: $(VENV)/.installed-dev  ## tokens per second against transformers, and what a reset costs
	$(PY) -m backtrack.bench
