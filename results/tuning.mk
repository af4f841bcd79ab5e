# What was tried on development seeds, and how it did: `make tuning` trains and measures every line below, and
# results/tuning.md lists them with what was chosen in the end, which the Makefile has. Each line adds its flags to the
# plain command of SFT, or to START of DPO; of a flag given twice the last counts. The lines of `both` are tried for the
# baseline and for backtracking alike.

START_OURS     := --beta 0.2 --lr 5e-5 --nll 0.2 --restart all --restart-weight 0.1
START_BASELINE := --beta 0.2 --lr 2e-4 --nll 1 --method baseline

both-sft-start    :=
both-sft-lr-5e-4  := --lr 5e-4
both-sft-lr-2e-3  := --lr 2e-3
both-sft-epochs-4 := --steps 391
both-sft-batch-16 := --batch-size 16 --lr 7e-4 --steps 781
both-sft-replay-0  = --data $(@D)/data/sft.jsonl
ours-sft-reset-weight-2 := --reset-weight 2
ours-sft-reset-weight-4 := --reset-weight 4
ours-sft-rows-twice      = --data $(@D)/data/sft.jsonl $(@D)/data/sft.jsonl $(@D)/data/replay.jsonl --steps 469

both-dpo-start    :=
both-dpo-lr-2e-5  := --lr 2e-5
both-dpo-lr-1e-4  := --lr 1e-4
both-dpo-lr-4e-4  := --lr 4e-4
both-dpo-beta-0.1 := --beta 0.1
both-dpo-beta-0.5 := --beta 0.5
both-dpo-nll-0    := --nll 0
both-dpo-nll-0.5  := --nll 0.5
ours-dpo-of-reset-weight-2 := --beta 0.1
ours-dpo-of-rows-twice     := --beta 0.1
ours-dpo-restart-none     := --restart none
ours-dpo-restart-weight-1 := --restart-weight 1
ours-dpo-discourage-0.5   := --discourage 0.5
ours-dpo-discourage-2     := --discourage 2
ours-dpo-elicit-0.5       := --elicit 0.5

TRIED := $(sort $(filter both-% ours-%,$(.VARIABLES)))
TRIED_BASELINE := $(patsubst both-%,baseline-%,$(filter both-%,$(TRIED)))
TRIED_OURS     := $(patsubst both-%,ours-%,$(TRIED))

# In these rules % is a line's name and $(RUN) the seed's directory.
$(RUN)/tried-ours-sft-%.done: $(RUN)/base.done
	$(SFT_COMMAND) $(STEPS) $(both-sft-$*) $(ours-sft-$*)
	@touch $@

$(RUN)/tried-baseline-sft-%.done: $(RUN)/base.done
	$(SFT_COMMAND) $(STEPS) --method baseline $(both-sft-$*)
	@touch $@

# The more special rule comes first: GNU make 3.81, which macOS ships, takes the first that matches.
$(RUN)/tried-ours-dpo-of-%.done: $(RUN)/tried-ours-sft-%.done
	$(DPO_COMMAND) --init $(@D)/tried-ours-sft-$* $(START_OURS) $(ours-dpo-of-$*)
	@touch $@

$(RUN)/tried-ours-dpo-%.done: $(RUN)/tried-ours-sft-start.done
	$(DPO_COMMAND) --init $(@D)/tried-ours-sft-start $(START_OURS) $(both-dpo-$*) $(ours-dpo-$*)
	@touch $@

$(RUN)/tried-baseline-dpo-%.done: $(RUN)/tried-baseline-sft-start.done
	$(DPO_COMMAND) --init $(@D)/tried-baseline-sft-start $(START_BASELINE) $(both-dpo-$*)
	@touch $@

$(RUN)/tuning.json: $(FOUR:%=$(RUN)/%.done) $(TRIED_BASELINE:%=$(RUN)/tried-%.done) $(TRIED_OURS:%=$(RUN)/tried-%.done)
	$(EVAL)

.PHONY: tuning
tuning: $(VENV)/.installed  ## what was tried on development seeds, and how it did: results/toy-tuning.json
	printf '%s\n' $(DEV_SEEDS) | OMP_NUM_THREADS=1 xargs -P $(JOBS) -I{} $(MAKE) THREADS=1 SEED={} $(RUNS)/toy-{}/tuning.json
	$(PY) -m backtrack.evaluate --merge $(DEV_SEEDS:%=$(RUNS)/toy-%/tuning.json) --out $(RESULTS)/toy-tuning.json
