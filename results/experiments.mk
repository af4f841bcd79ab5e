# The experiments behind results/: what `make eval attack figures` runs. Included by the Makefile.
#
# In the rules for files under runs/ % is the seed and $(@D) its directory.

.PHONY: eval attack figures hold-back bench bench-training bench-gpu

# Trainings and evaluations of `make eval` that run side by side, each on one thread.
JOBS   ?= 2

# The Makefile's settings were chosen on DEV_SEEDS; toy-resets and toy-tuning are of these. All else is of TEST_SEEDS, or
# of a part of them, which no choice has seen. Earlier work has used up 4-9, 100-102 and 200-204.
DEV_SEEDS ?= 0 1 2 3
ifdef QUICK
TEST_SEEDS  ?= 300
ATTACK_SEEDS ?= $(TEST_SEEDS)
TRAINING_SEEDS ?= $(TEST_SEEDS)
ATTACK_SIZE ?= --limit 3 --budget 256
LONG_SIZE   ?= --limit 1 --budget 512
UNIVERSAL_SIZE ?= --limit 8 --budget 512 --optimise-limit 2
ATTACKS     ?= easily decoding gcg autodan adaptive-gcg otherwise universal-gcg again
BIAS_SIZE   ?= --limit 8
SAMPLE_SIZE ?= --limit 12
RESULTS     ?= $(RUNS)/results
EXPERIMENTS ?= main filter bias filter-bias sampling triggers
else
TEST_SEEDS  ?= 300 301 302 303 304 305 306 307 308 309
ATTACK_SEEDS ?= $(TEST_SEEDS)
TRAINING_SEEDS ?= 300 301 302
ATTACK_SIZE ?= --limit 3 --budget 1024
LONG_SIZE   ?= --limit 1 --budget 16384
UNIVERSAL_SIZE ?= --limit 16 --budget 8192 --optimise-limit 4
ATTACKS     ?= easily decoding gcg autodan adaptive-gcg otherwise universal-gcg again
BIAS_SIZE   ?= --limit 32
SAMPLE_SIZE ?= --limit 48
RESULTS     ?= results
EXPERIMENTS ?= main filter bias filter-bias sampling triggers retry training in-place
endif

# ── Other ways to train ────────────────────────────────────────────────────────────────────────────

# The baseline sees shorter sequences; in this many steps it sees as many tokens as backtracking.
STEPS_LONG := 684

$(RUNS)/toy-%/sft-baseline-long.done: $(RUNS)/toy-%/base.done
	$(SFT_COMMAND) $(STEPS_LONG) $(SFT_BASELINE)
	@touch $@

# The control: the same unsafe beginnings and safe answers, but no [RESET], so nothing is taken back. It learns to turn
# round after one drawn prefix of a row; or, as [RESET] is learned, after every prefix, with the same weight.
$(RUNS)/toy-%/sft-in-place.done: $(RUNS)/toy-%/base.done
	$(SFT_COMMAND) $(STEPS) --method in-place --resets drawn
	@touch $@

$(RUNS)/toy-%/sft-in-place-every.done: $(RUNS)/toy-%/base.done
	$(SFT_COMMAND) $(STEPS) --method in-place $(SFT_OURS)
	@touch $@

$(RUNS)/toy-%/dpo-from-baseline.done: $(RUNS)/toy-%/sft-baseline.done
	$(DPO_COMMAND) --init $(@D)/sft-baseline $(DPO_OURS)
	@touch $@

$(RUNS)/toy-%/dpo-paper.done: $(RUNS)/toy-%/sft.done
	$(DPO_COMMAND) --init $(@D)/sft $(DPO_PAPER)
	@touch $@

$(RUNS)/toy-%/sft-restart-unsafe.done: $(RUNS)/toy-%/base.done
	$(SFT_COMMAND) $(STEPS) $(SFT_OURS) --restart unsafe
	@touch $@

$(RUNS)/toy-%/sft-restart-all.done: $(RUNS)/toy-%/base.done
	$(SFT_COMMAND) $(STEPS) $(SFT_OURS) --restart all
	@touch $@

# As in the paper: after one drawn prefix; and the same in expectation, after every prefix, as much as one token.
$(RUNS)/toy-%/sft-drawn.done: $(RUNS)/toy-%/base.done
	$(SFT_COMMAND) $(STEPS) --resets drawn
	@touch $@

$(RUNS)/toy-%/sft-weight-1.done: $(RUNS)/toy-%/base.done
	$(SFT_COMMAND) $(STEPS)
	@touch $@

# ── What it buys and what it costs: the paper's experiments, and what it leaves open ───────────────────────────────

EVAL = $(PY) -m backtrack.evaluate --prompts $(@D)/data/prompts.jsonl --judge $(@D)/data/world.json --out $@ \
	--ckpt $(patsubst %.done,%,$(filter %.done,$^))
FOUR := sft-baseline dpo-baseline sft dpo
UNSAFE_SETS := unseen unseen-ingredients wrapper
NEW_SETS    := $(UNSAFE_SETS) prefill-unseen benign-unseen benign-wrapper

# The main table.
$(RUNS)/toy-%/main.json: $(addprefix $(RUNS)/toy-%/,$(addsuffix .done, \
		sft-baseline dpo-baseline sft-baseline-long sft-in-place sft dpo))
	$(EVAL)

# What one would build without [RESET]: a filter around the baseline. It refuses (0 resets), or asks again first (1).
$(RUNS)/toy-%/fitted-filter.done: $(RUNS)/toy-%/sft-baseline.done
	$(TOY) $(PY) -m backtrack.evaluate.filter fit --ckpt $(@D)/sft-baseline --data $(@D)/data/sft.jsonl \
		--heldout $(@D)/data/sft_heldout.jsonl --max-length 128 --out $(@D)/fitted-filter
	@touch $@

FILTER = $(EVAL) --filter $(@D)/fitted-filter

$(RUNS)/toy-%/filter.json: $(RUNS)/toy-%/sft-baseline.done | $(RUNS)/toy-%/fitted-filter.done
	$(FILTER) --max-resets 0 1

# The dial: a bias on the logit of [RESET]. One prompt at a time, so that its times are a user's.
DIAL_SETS := $(UNSAFE_SETS) benign-unseen benign-wrapper

$(RUNS)/toy-%/bias.json: $(RUNS)/toy-%/sft.done $(RUNS)/toy-%/dpo.done
	$(EVAL) --sets $(DIAL_SETS) $(BIAS_SIZE) --batch-size 1 --reset-bias -10 -5 -2 0 2 5 10

$(RUNS)/toy-%/filter-bias.json: $(RUNS)/toy-%/sft-baseline.done | $(RUNS)/toy-%/fitted-filter.done
	$(FILTER) --sets $(DIAL_SETS) $(BIAS_SIZE) --reset-bias -4 -2 -1 0 1 2 4

# Best and worst of k.
$(RUNS)/toy-%/sampling.json: $(addprefix $(RUNS)/toy-%/,$(addsuffix .done,$(FOUR)))
	$(EVAL) --sets unseen unseen-ingredients $(SAMPLE_SIZE) --temperature 1 --samples 64 --batch-size 256

# What the retry sees, and how many it gets.
$(RUNS)/toy-%/retry.json: $(RUNS)/toy-%/sft.done $(RUNS)/toy-%/dpo.done
	$(EVAL) --sets $(NEW_SETS) --on-reset truncate keep --max-resets 0 1 2 4

# Other ways to train.
$(RUNS)/toy-%/training.json: $(addprefix $(RUNS)/toy-%/,$(addsuffix .done,sft sft-weight-1 sft-drawn \
		sft-restart-unsafe sft-restart-all dpo dpo-paper dpo-from-baseline sft-baseline))
	$(EVAL) --sets $(NEW_SETS) --on-reset truncate keep

# The control, taught after one prefix and after every prefix.
$(RUNS)/toy-%/in-place.json: $(addprefix $(RUNS)/toy-%/,$(addsuffix .done,sft sft-in-place sft-in-place-every sft-baseline))
	$(EVAL)

# [RESET] after the one prefix drawn, or after every prefix: on development seeds.
$(RUNS)/toy-%/resets.json: $(RUNS)/toy-%/sft-drawn.done $(RUNS)/toy-%/sft-weight-1.done
	$(EVAL)

$(RESULTS)/toy-resets.json: $(foreach seed,$(DEV_SEEDS),$(RUNS)/toy-$(seed)/resets.json)
	$(PY) -m backtrack.evaluate --merge $^ --out $@

$(RESULTS)/toy-%.json: $(foreach seed,$(TEST_SEEDS),$(RUNS)/toy-$(seed)/%.json)
	$(PY) -m backtrack.evaluate --merge $^ --out $@

$(RESULTS)/toy-training.json: $(foreach seed,$(TRAINING_SEEDS),$(RUNS)/toy-$(seed)/training.json)
	$(PY) -m backtrack.evaluate --merge $^ --out $@

$(RESULTS)/toy-in-place.json: $(foreach seed,$(TRAINING_SEEDS),$(RUNS)/toy-$(seed)/in-place.json)
	$(PY) -m backtrack.evaluate --merge $^ --out $@

# p([RESET]) along two answers of one world.
$(RESULTS)/toy-triggers.json: $(RUNS)/toy-$(firstword $(TEST_SEEDS))/sft.done
	$(PY) -m backtrack.evaluate.triggers --world $(<:/sft.done=) --out $@

# A clone has the tables already: so first what they are made of, or make would find nothing to do.
MEASURED = $(foreach experiment,$(filter-out training in-place triggers,$(EXPERIMENTS)), \
	$(TEST_SEEDS:%=$(RUNS)/toy-%/$(experiment).json))
MEASURED += $(foreach experiment,$(filter training in-place,$(EXPERIMENTS)), \
	$(TRAINING_SEEDS:%=$(RUNS)/toy-%/$(experiment).json))

eval: $(VENV)/.installed  ## every experiment on the test seeds, into results/; an hour. QUICK=1: minutes
	$(if $(QUICK),$(MAKE) $(TEST_SEEDS:%=$(RUNS)/toy-%/base.done))
	OMP_NUM_THREADS=1 $(MAKE) THREADS=1 -j $(JOBS) $(MEASURED)
	OMP_NUM_THREADS=1 $(MAKE) THREADS=1 -j $(JOBS) $(EXPERIMENTS:%=$(RESULTS)/toy-%.json)

# ── Attacks ────────────────────────────────────────────────────────────────────────────────────────────────────────

# $(call attack,NAME,MODEL,FILE,OPTIONS)
define attack
	$(PY) -m backtrack.attacks $1 --ckpt $(@D)/$2 --prompts $(@D)/data/prompts.jsonl --sets unseen unseen-ingredients \
		--judge $(@D)/data/world.json --seed $* --out $(@D)/attacks/$3.jsonl $4 >/dev/null

endef
four = $(foreach model,$(FOUR),$(call attack,$1,$(model),$1-$(model),$2))
ours = $(foreach model,sft dpo,$(call attack,$1,$(model),$1-$(model)-$2,$3))
FOUR_DONE = $(addprefix $(RUNS)/toy-%/,$(FOUR:=.done))

# Nothing is searched.
$(RUNS)/toy-%/attacked-easily.done: $(FOUR_DONE)
	$(call four,prefill,--limit 16)
	$(call four,instruct,--limit 16)
	$(call four,context,--limit 16)
	@touch $@

# Who sets the sampler: without resets, with a bias against them, at a temperature with many tries.
DECODING = $(PY) -m backtrack.evaluate --ckpt $(FOUR:%=$(@D)/%) --prompts $(@D)/data/prompts.jsonl --limit 16 \
	--sets unseen unseen-ingredients --judge $(@D)/data/world.json --seed $* --out $(@D)/attacks/$1.json $2 >/dev/null

$(RUNS)/toy-%/attacked-decoding.done: $(FOUR_DONE)
	$(call DECODING,decoding,--reset-bias 0 -2 -5)
	$(call DECODING,decoding-no-reset,--max-resets 0)
	$(call DECODING,decoding-warm,--max-resets 0 1 --temperature 1 --samples 16 --batch-size 256)
	@touch $@

# GCG and AutoDAN aim at an opening that says yes, as they do on AdvBench; the adaptive attacker at the whole answer.

$(RUNS)/toy-%/attacked-gcg.done: $(FOUR_DONE)
	$(call four,gcg,$(ATTACK_SIZE) --target-tokens 8)
	@touch $@

$(RUNS)/toy-%/attacked-autodan.done: $(FOUR_DONE)
	$(call four,autodan,$(ATTACK_SIZE) --target-tokens 8)
	@touch $@

$(RUNS)/toy-%/attacked-adaptive-gcg.done: $(FOUR_DONE)
	$(call four,adaptive-gcg,$(ATTACK_SIZE))
	@touch $@

# Who knows less (8 tokens of the answer), may write elsewhere, or takes more time.
$(RUNS)/toy-%/attacked-otherwise.done: $(RUNS)/toy-%/sft.done $(RUNS)/toy-%/dpo.done
	$(call ours,adaptive-gcg,grow,$(ATTACK_SIZE) --target-tokens 8 --grow)
	$(call ours,adaptive-gcg,first-turn,$(ATTACK_SIZE) --place first-turn)
	$(call ours,adaptive-gcg,long,$(LONG_SIZE))
	@touch $@

# One suffix for all, found with questions about other things.
$(RUNS)/toy-%/attacked-universal-gcg.done: $(FOUR_DONE)
	$(call four,universal-gcg,--sets unseen --optimise $(@D)/data/prompts.jsonl --optimise-sets unseen-ingredients \
		$(UNIVERSAL_SIZE))
	@touch $@

# What the defender can still change against the adaptive attack.
$(RUNS)/toy-%/attacked-again.done: $(RUNS)/toy-%/dpo.done
	$(call attack,adaptive-gcg,dpo,adaptive-gcg-dpo-keep,$(ATTACK_SIZE) --on-reset keep)
	$(call attack,adaptive-gcg,dpo,adaptive-gcg-dpo-4-resets,$(ATTACK_SIZE) --max-resets 4)
	$(call attack,adaptive-gcg,dpo,adaptive-gcg-dpo-bias-5,$(ATTACK_SIZE) --reset-bias 5)
	@touch $@

ATTACKED = $(foreach seed,$(ATTACK_SEEDS),$(ATTACKS:%=$(RUNS)/toy-$(seed)/attacked-%.done))

$(RESULTS)/toy-attacks.json: $(ATTACKED)
	$(PY) -m backtrack.attacks table $(ATTACK_SEEDS:%=$(RUNS)/toy-%/attacks/*.jsonl) --out $@

attack: $(VENV)/.installed  ## the attacks on the test seeds, after make eval; half an hour on 2 cores
	OMP_NUM_THREADS=1 $(MAKE) THREADS=1 -j $(JOBS) $(ATTACKED)
	$(MAKE) $(RESULTS)/toy-attacks.json

# What a user has read of an unsafe answer before it is taken back, against the delay of the stream.
hold-back: $(RUN)/sft.done  ## how late to stream, so that retracted text is not seen
	$(TOY) $(PY) -m backtrack.evaluate.hold_back --ckpt $(RUN)/sft --prompts $(RUN)/data/prompts.jsonl \
		--judge $(RUN)/data/world.json --out $(RESULTS)/toy-hold-back.json

figures: $(VENV)/.installed-figures  ## the pictures and tables of results/, from its JSON
	$(PY) -m backtrack.report.tables --results $(RESULTS)
	$(PY) -m backtrack.report.figures --results $(RESULTS)

# ── Speed ────────────────────────────────────────────────────────────────────────────────────────────────────────

bench: $(VENV)/.installed-dev runs/smollm2/model.safetensors  ## tokens per second against transformers, and what a reset costs
	$(PY) -m backtrack.bench
	$(MEMORY) $(PY) -m backtrack.bench.limits
	$(PY) -m backtrack.bench.commands --ckpt runs/smollm2

bench-gpu: $(VENV)/.installed-dev  ## on a CUDA device: what SFT and decoding of Llama-3-8B's shape make of it
	$(PY) -m backtrack.bench.gpu --out $(RESULTS)/bench-gpu.json

# Preference rows and the tokenizer to cut them with; data/README.md says how to make them.
ROWS      ?= runs/real/hh.jsonl
TOKENIZER ?= llama3-tokenizer

bench-training: $(VENV)/.installed  ## row trees against separate sequences: ROWS=… TOKENIZER=…
	$(PY) -m backtrack.bench.training --rows $(ROWS) --tokenizer $(TOKENIZER)
