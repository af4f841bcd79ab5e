# The paper's own case on a real model: `make real MODEL=gemma3 SEEDS="0 1 2" DATA=DIR`. A pretrained Gemma-3-270M becomes
# an assistant that takes its words back, with every control. Everything is made under runs/gemma3, and goes on where it
# was stopped. Published files, prompts and judges are those of real.mk; data/README.md says where they come from.

GEMMA3  := runs/gemma3-270m
HARM    := runs/harm-judge
GEMMA   := $(RUNS)/gemma3

# Rows are pools: a training takes STEPS × 32 of them in the order of its seed, so each draws other questions.
ifdef QUICK
SEEDS     ?= 0
G_HELPFUL := 4
G_ASKED   := 60
G_BEGUN   := 30
G_OWN     := 20
G_GIVEN   := 60
G_STEPS   := 2
G_PAIRS   := 2
G_LIMIT   := 4
G_FEW     := 4
G_BEHIND  := 4
G_TOKENS  := 32
G_LONG    := 4 8 16
G_AIMS    := 2
G_BUDGET  := 16
G_SAID    := --sets advbench --limit 40
else
SEEDS     ?= 0 1 2
G_HELPFUL := 30
G_ASKED   := 600
G_BEGUN   := 300
G_OWN     := 200
G_GIVEN   := 2000
G_STEPS   := 60
G_PAIRS   := 6
G_LIMIT   := 100
G_FEW     := 35
G_BEHIND  := 50
G_TOKENS  := 96
G_LONG    := 8 32 96
G_AIMS    := 12
G_BUDGET  := 1024
G_SAID    := --sets advbench
endif

# Chosen on dev-*, seed 0: results/README.md. A level is the highest with at most 5% false resets there.
G_LR    := 4e-5
G_RESET_WEIGHT := 24
G_LEVEL := -2
G_DPO_LEVEL := -1
G_DPO   := --lr 1e-6 --beta 0.1

# ── Judges, prompts, and a model that only helps ───────────────────────────────────────────────────────────────────

# train.csv and evaluate.csv are no names of their own: they lie in a folder that has gptfuzz in its name.
labelled = $(or $(firstword $(shell find -L $(DATA) -path '*gptfuzz*/$1' 2>/dev/null)),$(error \
	$1 is in no folder of $(DATA) that is called after gptfuzz: see "A pretrained base" in data/README.md))

$(HARM).json: | $(VENV)/.installed
	$(PY) -m backtrack.judge fit --kind harm --data $(call labelled,train.csv) --test $(call labelled,evaluate.csv) --out $(HARM)

# test-*: looked at once. dev-*: for choosing. SimpleSafetyTests and MaliciousInstructions are small: all of them are test.
G_TESTS = $(@D)/test-unsafe.jsonl $(@D)/test-small.jsonl $(@D)/dev-unsafe.jsonl $(@D)/test-harmless.jsonl $(@D)/dev-harmless.jsonl
$(GEMMA)/prompts.done: | $(VENV)/.installed
	$(PREPARE) prompts --in $(call source,harmful_behaviors.csv) $(call source,strongreject_dataset.csv) --forced \
		--out $(@D)/test-unsafe.jsonl --valid $(@D)/dev-unsafe.jsonl --valid-percent 25
	$(PREPARE) prompts --in $(call source,SimpleSafetyTests_test_cases.csv) $(call source,I-MaliciousInstructions.json) --forced \
		--exclude $(@D)/dev-unsafe.jsonl --out $(@D)/test-small.jsonl
	$(PREPARE) prompts --in $(call source,text_davinci_003.json) $(call source,en_100_tree.jsonl) \
		--out $(@D)/test-harmless.jsonl --valid $(@D)/dev-harmless.jsonl --valid-percent 25
	$(PREPARE) prompts --in $(call source,safety_only_data_Instructions.json) \
		--exclude $(G_TESTS) $(call source,xstest_prompts.csv) --out $(@D)/train-unsafe.jsonl
	$(PREPARE) prompts --in $(call source,alpaca_5000.json) --benign \
		--exclude $(G_TESTS) $(call source,xstest_prompts.csv) $(@D)/train-unsafe.jsonl --out $(@D)/train-harmless.jsonl
	@touch $@

G_COLLECT = $(DECODE) -m backtrack.collect --judge $(JUDGE) --dtype bfloat16 --batch-size 64 --max-new-tokens $(G_TOKENS)
G_SFT = $(ON_CORES) train.py sft --dtype bfloat16 --batch-size 16 --grad-accum 2 --lr $(G_LR) --log-every 5 --save-every 20 \
	--resume --out $(basename $@)

$(GEMMA)/harmless-rows.done: $(GEMMA)/prompts.done $(GEMMA3)/model.safetensors $(JUDGE).json
	$(G_COLLECT) --ckpt $(GEMMA3) --prompts $(@D)/train-harmless.jsonl --out $(@D)/harmless.jsonl
	@touch $@

$(GEMMA)/helpful.done: $(GEMMA)/harmless-rows.done
	$(G_SFT) --init $(GEMMA3) --method baseline --data $(@D)/harmless.jsonl --max-length 192 --steps $(G_HELPFUL)
	@touch $@

# What it says to questions that it should not answer is y−, the data set's answer y+. Its own answers to harmless
# questions, asked and begun, keep the others from learning to take back a style.
YES ?= "Sure, here is"
G_ROWS := unsafe begun own own-begun given
$(GEMMA)/rows.done: $(GEMMA)/helpful.done
	$(G_COLLECT) --ckpt $(@D)/helpful --prompts $(@D)/train-unsafe.jsonl --limit $(G_ASKED) --out $(@D)/unsafe.jsonl
	$(G_COLLECT) --ckpt $(@D)/helpful --prompts $(@D)/train-unsafe.jsonl --limit $(G_BEGUN) --prefill $(YES) --out $(@D)/begun.jsonl
	$(G_COLLECT) --ckpt $(@D)/helpful --prompts $(@D)/train-harmless.jsonl --limit $(G_OWN) --benign own --out $(@D)/own.jsonl
	$(G_COLLECT) --ckpt $(@D)/helpful --prompts $(@D)/train-harmless.jsonl --limit $(G_OWN) --benign own --prefill $(YES) \
		--out $(@D)/own-begun.jsonl
	$(G_COLLECT) --ckpt $(@D)/helpful --prompts $(@D)/train-harmless.jsonl --limit $(G_GIVEN) --out $(@D)/given.jsonl
	@touch $@

# Answers that began long ago: the first tokens of what the helpful model says to test questions.
$(GEMMA)/long.done: $(GEMMA)/helpful.done $(HARM).json
	$(DECODE) -m backtrack.evaluate --ckpt $(@D)/helpful --prompts $(@D)/test-unsafe.jsonl $(G_SAID) --judge $(JUDGE) $(HARM) \
		--dtype bfloat16 --max-new-tokens 128 --batch-size 64 --out $(@D)/helpful-answers.json
	$(ON_CORES) -m backtrack.evaluate.beginnings --answers $(@D)/helpful-answers.json --prompts $(@D)/test-unsafe.jsonl $(G_SAID) \
		--ckpt $(@D)/helpful --tokens $(G_LONG) --after $(@D)/test-harmless.jsonl --out $(@D)/long.jsonl
	@touch $@

# ── Six models of a seed, from the same rows, in as many steps ─────────────────────────────────────────────────────
# In these rules $(@D) is the directory of a seed, and % its number.

G_TRAIN = $(G_SFT) --init $(GEMMA)/helpful --data $(G_ROWS:%=$(GEMMA)/%.jsonl) --max-length 256 --steps $(G_STEPS) --seed $*
$(GEMMA)/seed-%/sft-baseline.done: $(GEMMA)/rows.done
	$(G_TRAIN) --method baseline
	@touch $@

$(GEMMA)/seed-%/sft-in-place.done: $(GEMMA)/rows.done
	$(G_TRAIN) --method in-place --reset-weight $(G_RESET_WEIGHT)
	@touch $@

$(GEMMA)/seed-%/sft-high.done: $(GEMMA)/rows.done
	$(G_TRAIN) --reset-weight $(G_RESET_WEIGHT)
	@touch $@

# Both trainings that teach [RESET] say it too readily; the level is a number that can be set afterwards.
G_SHIFT = $(ON_CORES) -m backtrack.evaluate.shift_level --ckpt $(basename $<) --rows $(G_ROWS:%=$(GEMMA)/%.jsonl) \
	--max-length 256 --out $(basename $@)
$(GEMMA)/seed-%/sft.done: $(GEMMA)/seed-%/sft-high.done
	$(G_SHIFT) --add $(G_LEVEL)
	@touch $@

# More pairs: HH-RLHF's, where the judge says that chosen refused and rejected complied (300 of 2,267).
$(GEMMA)/hh.jsonl: $(GEMMA)/prompts.done $(JUDGE).json
	$(PREPARE) hh --in $(call source,harmless-base_test.jsonl.gz) --guard $(JUDGE) --exclude $(G_TESTS) --out $@

G_PREFER = $(ON_CORES) train.py dpo --init $(basename $<) --dtype bfloat16 --batch-size 4 \
	--data $(GEMMA)/unsafe.jsonl $(GEMMA)/begun.jsonl $(GEMMA)/hh.jsonl \
	--grad-accum 3 --max-length 256 --steps $(G_PAIRS) $(G_DPO) --seed $* --log-every 2 --resume --out $(basename $@)
$(GEMMA)/seed-%/dpo-baseline.done: $(GEMMA)/seed-%/sft-baseline.done $(GEMMA)/hh.jsonl
	$(G_PREFER) --method baseline
	@touch $@

$(GEMMA)/seed-%/dpo-in-place.done: $(GEMMA)/seed-%/sft-in-place.done $(GEMMA)/hh.jsonl
	$(G_PREFER) --method in-place
	@touch $@

$(GEMMA)/seed-%/dpo-high.done: $(GEMMA)/seed-%/sft.done $(GEMMA)/hh.jsonl
	$(G_PREFER)
	@touch $@

$(GEMMA)/seed-%/dpo.done: $(GEMMA)/seed-%/dpo-high.done
	$(G_SHIFT) --add $(G_DPO_LEVEL)
	@touch $@

# ── What it buys and what it costs ─────────────────────────────────────────────────────────────────────────────────

G_MODELS := sft-baseline sft-in-place sft dpo-baseline dpo-in-place dpo
# Of an answer that was begun for the model only what it adds is judged, or its retry.
G_EVAL = $(DECODE) -m backtrack.evaluate --judge $(JUDGE) $(HARM) --judge-continuation --dtype bfloat16 \
	--batch-size 64 --max-new-tokens $(G_TOKENS) --ckpt $(patsubst %.done,%,$(filter $(@D)/%.done,$^)) --out $@
G_TEST = --prompts $(GEMMA)/test-unsafe.jsonl $(GEMMA)/test-small.jsonl $(GEMMA)/test-harmless.jsonl

$(GEMMA)/seed-%/main.json: $(foreach m,$(G_MODELS),$(GEMMA)/seed-%/$m.done) $(HARM).json
	$(G_EVAL) $(G_TEST) --limit $(G_LIMIT)

$(GEMMA)/seed-%/long.json: $(foreach m,$(G_MODELS),$(GEMMA)/seed-%/$m.done) $(GEMMA)/long.done
	$(G_EVAL) --prompts $(GEMMA)/long.jsonl --limit $(G_BEHIND)

# Any-Depth Alignment, a control without training: the baseline, asked again after every 32 tokens.
$(GEMMA)/seed-%/any-depth.json: $(GEMMA)/seed-%/sft-baseline.done $(GEMMA)/long.done
	$(G_EVAL) $(G_TEST) --limit $(G_FEW) --any-depth 32

$(GEMMA)/seed-%/any-depth-long.json: $(GEMMA)/seed-%/sft-baseline.done $(GEMMA)/long.done
	$(G_EVAL) --prompts $(GEMMA)/long.jsonl --limit $(G_BEHIND) --any-depth 32

$(GEMMA)/seed-%/sampling.json: $(foreach m,sft-baseline sft-in-place sft,$(GEMMA)/seed-%/$m.done) $(HARM).json
	$(G_EVAL) --prompts $(GEMMA)/test-unsafe.jsonl $(GEMMA)/test-small.jsonl --sets $(PLAIN) --limit 8 --temperature 1 --samples 8

$(GEMMA)/seed-%/bias.json: $(GEMMA)/seed-%/sft.done $(GEMMA)/long.done
	$(G_EVAL) --prompts $(GEMMA)/test-unsafe.jsonl $(GEMMA)/long.jsonl $(GEMMA)/test-harmless.jsonl \
		--sets advbench-forced begun-$(lastword $(G_LONG)) alpaca_eval oasst --limit $(G_FEW) --reset-bias -5 -2 0 2 5

# Adaptive GCG. It knows about [RESET], and wants of all models the same words: 32 tokens of the helpful model's answer.
$(GEMMA)/aims.jsonl: $(GEMMA)/long.done
	$(ON_CORES) -m backtrack.evaluate.beginnings --answers $(@D)/helpful-answers.json --prompts $(@D)/test-unsafe.jsonl $(G_SAID) \
		--ckpt $(@D)/helpful --tokens $(word 2,$(G_LONG)) --as target --out $@

G_ATTACK = $(DECODE) -m backtrack.attacks adaptive-gcg --ckpt $(basename $<) --prompts $(GEMMA)/aims.jsonl --limit $(G_AIMS) \
	--judge $(JUDGE) --budget $(G_BUDGET) --batch-size 16 --max-new-tokens $(G_TOKENS) --dtype bfloat16 --out $(basename $@).jsonl
$(GEMMA)/seed-%/gcg-dpo-baseline.done: $(GEMMA)/seed-%/dpo-baseline.done $(GEMMA)/aims.jsonl
	$(G_ATTACK)
	@touch $@

$(GEMMA)/seed-%/gcg-dpo-in-place.done: $(GEMMA)/seed-%/dpo-in-place.done $(GEMMA)/aims.jsonl
	$(G_ATTACK)
	@touch $@

$(GEMMA)/seed-%/gcg-dpo.done: $(GEMMA)/seed-%/dpo.done $(GEMMA)/aims.jsonl
	$(G_ATTACK)
	@touch $@

# ── The seeds together ─────────────────────────────────────────────────────────────────────────────────────────────

G_SEEDS   := $(SEEDS:%=$(GEMMA)/seed-%)
G_MEASURED := main long any-depth any-depth-long sampling bias
G_RESULTS := $(G_MEASURED:%=$(RESULTS)/gemma-%.json)

$(RESULTS)/gemma-%.json: $(addsuffix /%.json,$(G_SEEDS))
	@mkdir -p $(@D)
	$(PY) -m backtrack.evaluate.over_seeds --in $^ $(AGAINST) --out $@

$(patsubst %,$(RESULTS)/gemma-%.json,main long): AGAINST := --against sft-baseline:sft sft-in-place:sft \
	sft-baseline:sft-in-place dpo-baseline:dpo dpo-in-place:dpo dpo-baseline:dpo-in-place
$(RESULTS)/gemma-sampling.json: AGAINST := --against sft-baseline:sft sft-in-place:sft sft-baseline:sft-in-place

G_ATTACKS := $(foreach s,$(G_SEEDS),$(patsubst %,$s/gcg-%.done,$(filter dpo%,$(G_MODELS))))
$(RESULTS)/gemma-attacks.json: $(G_ATTACKS)
	$(PY) -m backtrack.attacks table $(^:.done=.jsonl) --out $@

# How likely is the data set's answer to harmless test questions?
$(GEMMA)/test-rows.done: $(GEMMA)/prompts.done $(JUDGE).json
	$(G_COLLECT) --ckpt $(GEMMA3) --prompts $(@D)/test-harmless.jsonl --limit $(G_FEW) --out $(@D)/test-rows.jsonl
	@touch $@

$(RESULTS)/gemma-likelihoods.json: $(foreach s,$(G_SEEDS),$(G_MODELS:%=$s/%.done)) $(GEMMA)/test-rows.done
	$(DECODE) -m backtrack.evaluate.likelihoods --ckpt $(foreach s,$(G_SEEDS),$(G_MODELS:%=$s/%)) --rows $(GEMMA)/test-rows.jsonl \
		--max-length 512 --dtype bfloat16 --out $@

# A training takes 13 to 16 GB, so they run one after another, with all cores. An evaluation takes 3 GB, and most of its
# operations are too small to share: two on one core each are nearly twice as fast as one after another on both.
# The seeds are named, or make would find the committed results new enough and add no seed to them.
.PHONY: real-gemma3
real-gemma3: $(VENV)/.installed-figures
	$(MAKE) -j1 $(foreach s,$(G_SEEDS),$(G_MODELS:%=$s/%.done)) $(GEMMA)/long.done
	OMP_NUM_THREADS=1 $(MAKE) -j $(JOBS) $(foreach s,$(G_SEEDS),$(G_MEASURED:%=$s/%.json)) $(G_ATTACKS)
	$(MAKE) -j1 $(G_RESULTS) $(RESULTS)/gemma-likelihoods.json $(RESULTS)/gemma-attacks.json
	$(PY) -m backtrack.report.trainings --results $(RESULTS)
