"""The model that a run trains: read from disk, in slices under torchrun, with LoRA if asked for."""

from functools import partial

import torch

from backtrack.run import lora, parallel
from backtrack.run.progress import Run
from model import InputError, ModelConfig, Transformer, load_model
from model.checkpoint import take_memory


def load(path: str, run: Run) -> Transformer:
    """A model to train; under torchrun each process reads its slices.

    With LoRA `path` is the frozen model, also when a run goes on: the factors are read later.
    """
    model = load_model(path, run.machine.home, prepare=partial(prepare, run=run))
    lora.start(model, run.options.seed)
    return model


def fresh(config: str, run: Run) -> Transformer:
    """A model with random weights, of the shape that the file `config` says."""
    with torch.device("meta"):
        model = Transformer(ModelConfig.load(config))
    prepare(model, run)
    take_memory(model, run.machine.home)
    model.init_weights(run.options.seed)
    return model


def prepare(model: Transformer, run: Run) -> None:
    """What has to be decided while the model is on the meta device, before it takes memory.

    Raises InputError if the tokenizer or the sequences are too large for the model.
    """
    config, tok, machine = model.config, run.tok, run.machine
    if config.vocab_size < tok.vocab_size:
        raise InputError(
            f"the tokenizer has {tok.vocab_size} ids but the model only {config.vocab_size} rows"
        )
    longest = run.settings["max_length"]
    if run.options.steps and config.max_position_embeddings < longest:
        raise InputError(
            f"--max-length {longest} exceeds the model's {config.max_position_embeddings}"
        )
    for block in model.model.layers:
        block.recompute = machine.checkpoint_activations
    if machine.lora:
        with torch.device("meta"):
            ids = {tok.reset_id, *tok.template_ids, *tok.stop_ids}
            lora.adapt(model, machine.lora, sorted(ids))
    parallel.shard(model, machine)
