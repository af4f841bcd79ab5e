"""[RESET] for users of transformers. Exported models carry this file as custom_generate/generate.py:

    model = AutoModelForCausalLM.from_pretrained(DIR)
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, custom_generate=DIR, trust_remote_code=True, max_new_tokens=200)

What comes back is prompt ⊕ surviving answer, as from generate() itself, whose options all work (sampling, logits
processors, max_new_tokens: per attempt), except a streamer and beams. And three more:

    max_resets    after that many, [RESET] is masked (default: 1)
    reset_bias    added to the logit of [RESET]
    forced        the last so many ids of the prompt are a forced beginning of the answer: a reset takes them back too

The retry sees prompt ⊕ [RESET] for every reset so far. It reads the prompt anew, which backtrack.generate does not.
"""

import torch
from torch.nn.utils.rnn import pad_sequence


def generate(inputs=None, *, model, max_resets=1, reset_bias=0.0, forced=0, **options):
    """(B, T) ids -> (B, T - forced + N): prompts without what was forced, surviving answers, padding behind them."""
    for name in ("streamer", "return_dict_in_generate"):
        if options.get(name):
            raise ValueError(f"{name} would show what is taken back; leave it out")
    if (options.get("num_beams") or 1) > 1:
        raise ValueError("a beam cannot be taken back; leave num_beams out")
    given = options.pop("input_ids", None)
    prompt = given if inputs is None else inputs
    mask = options.pop("attention_mask", None)
    mask = torch.ones_like(prompt) if mask is None else mask
    copies = options.pop("num_return_sequences", None) or 1
    prompt, mask = prompt.repeat_interleave(copies, 0), mask.repeat_interleave(copies, 0)

    reset = model.config.reset_token_id
    config = options.get("generation_config") or model.generation_config
    stops = options.pop("eos_token_id", None) or config.eos_token_id
    stops = [id for id in (stops if isinstance(stops, list) else [stops]) if id is not None and id != reset]
    padding = options.pop("pad_token_id", config.pad_token_id)
    padding = stops[0] if padding in (None, reset) else padding  # padding must not look like a reset
    masked = [*(options.pop("suppress_tokens", None) or config.suppress_tokens or []), reset]
    options |= {"eos_token_id": [*stops, reset], "pad_token_id": padding}

    bare = prompt.shape[1] - forced  # where the answers begin
    answers = [None] * len(prompt)
    rows = list(range(len(prompt)))  # that have no answer yet
    context, seen, begin = prompt, mask, bare
    for resets in range(max_resets + 1):
        last = resets == max_resets
        how = {"suppress_tokens": masked} if last else {"sequence_bias": [[[reset], float(reset_bias)]]}
        # The class's own: model.generate is this function if the model was loaded with trust_remote_code.
        out = type(model).generate(model, context, attention_mask=seen, **how, **options)
        again = []
        for slot, row in enumerate(rows):
            answers[row] = out[slot, begin:]
            if not last and reset in answers[row].tolist():
                again.append(slot)
        if not again:
            break
        # Back to the prompt and the resets before this one; [RESET] is read next.
        rows = [rows[slot] for slot in again]
        begin = bare + resets + 1
        context = torch.cat((context[again, : begin - 1], context.new_full((len(again), 1), reset)), dim=1)
        seen = torch.cat((seen[again, : begin - 1], seen.new_ones(len(again), 1)), dim=1)
    answers = pad_sequence(answers, batch_first=True, padding_value=padding)
    return torch.cat((prompt[:, :bare], answers), dim=1)
