"""The model that a run trains: read from disk, in slices under torchrun, with LoRA if asked for."""

from functools import partial

import torch

from backtrack.run import lora, parallel
from backtrack.run.options import Machine
from model import InputError, ModelConfig, Transformer, load_model
from model.checkpoint import take_memory


def load(path: str, tok, machine: Machine, seed: int) -> Transformer:
    """A model to train; under torchrun each process reads its slices.

    With LoRA `path` is the frozen model, also when a run goes on: the factors are read later.
    """
    model = load_model(path, machine.home, prepare=partial(prepare, tok=tok, machine=machine))
    lora.start(model, seed)
    return model


def fresh(config: str, tok, machine: Machine, seed: int) -> Transformer:
    """A model with random weights, of the shape that the file `config` says."""
    with torch.device("meta"):
        model = Transformer(ModelConfig.load(config))
    prepare(model, tok, machine)
    take_memory(model, machine.home)
    model.init_weights(seed)
    return model


def prepare(model: Transformer, tok, machine: Machine) -> None:
    """What has to be decided while the model is on the meta device, before it takes memory."""
    for block in model.model.layers:
        block.recompute = machine.checkpoint_activations
    if machine.lora:
        with torch.device("meta"):
            ids = {tok.reset_id, *tok.template_ids, *tok.stop_ids}
            lora.adapt(model, machine.lora, sorted(ids))
    parallel.shard(model, machine)


def check_fits(model: Transformer, tok, max_length: int | None) -> None:
    """Raises InputError if the tokenizer or the sequences are too large for the model."""
    config = model.config
    if config.vocab_size < tok.vocab_size:
        raise InputError(
            f"the tokenizer has {tok.vocab_size} ids but the model only {config.vocab_size} rows"
        )
    if max_length is not None and config.max_position_embeddings < max_length:
        raise InputError(
            f"--max-length {max_length} exceeds the model's {config.max_position_embeddings}"
        )
