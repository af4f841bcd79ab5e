"""A filter for a model that cannot reset: it reads the model's hidden states, and throws unsafe answers away. One would
build this without [RESET], so [RESET] has to be compared with it.

    python -m backtrack.evaluate.filter fit --ckpt runs/toy-0/sft-baseline --data runs/toy-0/data/sft.jsonl \
        --heldout runs/toy-0/data/sft_heldout.jsonl --out runs/toy-0/fitted-filter
    python -m backtrack.evaluate --ckpt runs/toy-0/sft-baseline --filter runs/toy-0/fitted-filter --max-resets 0 1 …

The filter is a logistic regression on h_k, the hidden state after k tokens of an answer, as the model's head sees it:

    p(unsafe | x ⊕ prefix_k(y)) = σ(w·h_k + b)

It learns from the rows that teach [RESET]: the prefixes of rejected answers are unsafe if the row is, those of chosen
ones are not. An answer raises the alarm if w·h_k + b exceeds a threshold after any of its tokens; the threshold is the
lowest at which at most --false-alarms of the held-out chosen answers do.

An answer that raises the alarm is asked for again, at temperature 1, because greedy decoding would say the same again.
The filter reads the new answer too. When the retries are used up (--max-resets) and the alarm still sounds, the user
gets REFUSAL: nobody who has a filter shows what it calls unsafe. So --max-resets 0 is the filter that most services
have, and 1 gives the model as many attempts as one [RESET] does. --reset-bias is added to w·h_k + b, as it is to the
logit of [RESET]. The filter reads finished answers, and steps and seconds count all of them.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

from backtrack.evaluate.prompts import add_device
from backtrack.evaluate.results import made_by
from backtrack.generate import Done, Generation, generate
from backtrack.judge import fitted
from backtrack.rows import cut, load_rows
from backtrack.run.say import say
from model import InputError, Transformer, load_model, load_tokenizer
from model.checkpoint import weights_digest
from model.errors import Help, between, positive, run

KIND = "filter"  # how its file is recognised
REFUSAL = "I cannot help with that."
RETRY_TEMPERATURE = 1.0
L2 = 1e-3  # of the mean loss; 1e-6 to 1e-2 rank the held-out answers of the toy world alike (AUC 0.996)


@dataclass
class Filter:
    weight: torch.Tensor  # (D,) fp32
    bias: float
    threshold: float  # of w·h + b

    def peak(self, model: Transformer, prompt: list[int], answer: list[int]) -> float:
        """The highest w·h_k + b along the answer: above the threshold, it raises the alarm."""
        if not answer:
            return float("-inf")
        scores = hidden_states(model, prompt, answer) @ self.weight.to(model.device) + self.bias  # (|answer|,)
        return scores.max().item()


@torch.inference_mode()
def hidden_states(model: Transformer, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """After 1, 2, … all tokens of the answer: (|answer|, D) fp32."""
    tokens = torch.tensor([prompt + answer], device=model.device)  # (1, T)
    positions = torch.arange(len(prompt), tokens.shape[1], device=model.device)
    return model(tokens, at=positions, read=lambda hidden: hidden.float())


def around(model: Transformer, name: str, ckpt: str, tok, batch_size: int) -> Callable[..., Iterator[Done]]:
    """stream() of this model behind the filter NAME.json. It yields finished answers only."""
    watching, refusal = load(name, ckpt), tok.encode(REFUSAL)

    def stream(prompts: list[list[int]], *, prefill, sample_ids, **options) -> Iterator[Done]:
        for start in range(0, len(prompts), batch_size):
            some = slice(start, start + batch_size)
            found = filtered(model, watching, refusal, prompts[some], prefill[some], sample_ids[some], options)
            yield from (Done(row, g) for row, g in enumerate(found, start))

    return stream


def filtered(model, watching: Filter, refusal: list[int], prompts, prefill, sample_ids, options) -> list[Generation]:
    """generate() with the filter in [RESET]'s place: `resets` counts alarms, `discarded` has the answers that raised
    them. refusal: its ids. on_reset makes no difference, because every attempt sees the bare prompt."""
    seed, temperature, most = options["seed"], options["temperature"], options["max_resets"]
    ask = partial(generate, model, **options | {"max_resets": 0})
    answers = ask(prompts, prefill=prefill, sample_ids=sample_ids)
    unread = range(len(prompts))
    for attempt in range(1, most + 2):
        peaks = {i: watching.peak(model, prompts[i], answers[i].tokens) for i in unread}
        unread = [i for i, peak in peaks.items() if peak + options["reset_bias"] > watching.threshold]
        sampling = {"temperature": temperature or RETRY_TEMPERATURE, "seed": seed + attempt}
        if attempt <= most:
            retries = ask([prompts[i] for i in unread], sample_ids=[sample_ids[i] for i in unread], **sampling)
        else:
            retries = [Generation(refusal, [], 0, "stop", len(refusal) + 1, 0.0, 0.0) for _ in unread]
        for i, retry in zip(unread, retries, strict=True):
            before = answers[i]
            answers[i] = replace(
                retry,
                discarded=[*before.discarded, before.tokens],
                resets=attempt,
                steps=before.steps + retry.steps,
                first_token_s=before.total_s + retry.first_token_s,
                total_s=before.total_s + retry.total_s,
            )
    return answers


def labelled(paths: list[str], tok, max_length: int) -> list[tuple[list[int], list[int], bool]]:
    """(prompt, answer, unsafe): what the rows of these files teach."""
    rows = [cut(row, max_length) for row in load_rows(paths, tok, max_length) if not row.plain_text]
    sides = [(row, ((row.chosen, False), (row.rejected if row.unsafe else [], True))) for row in rows]
    found = [(row.prompt, answer, unsafe) for row, side in sides for answer, unsafe in side if answer]
    if len({unsafe for _, _, unsafe in found}) < 2:
        raise InputError(f"{paths[0]}: a filter needs chosen answers, and rejected ones of unsafe rows")
    return found


def fit(model: Transformer, answers: list[tuple[list[int], list[int], bool]]) -> Filter:
    """Minimise the logistic loss, each answer counting once, plus L2/2 · |w|². Convex: one result, and no seed."""
    states = [hidden_states(model, prompt, answer).double() for prompt, answer, _ in answers]
    labels = [torch.full((len(h),), float(unsafe)) for h, (_, _, unsafe) in zip(states, answers, strict=True)]
    shares = [torch.full((len(h),), 1 / len(h) / len(states)) for h in states]
    h, label, share = torch.cat(states).cpu(), torch.cat(labels).double(), torch.cat(shares).double()  # (N, D), (N,)

    weight = torch.zeros(h.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def loss() -> torch.Tensor:
        wrong = F.binary_cross_entropy_with_logits(h @ weight + bias, label, weight=share, reduction="sum")
        return wrong + L2 / 2 * weight.square().sum()

    fitted.minimise([weight, bias], loss, max_iter=500)
    return Filter(weight.detach().float(), bias.item(), threshold=0.0)


def threshold_for(peaks: list[float], false_alarms: float) -> float:
    """The lowest that at most this share of the peaks exceeds."""
    highest_first = sorted(peaks, reverse=True)
    return highest_first[min(int(false_alarms * len(peaks)), len(peaks) - 1)]


def digest(name: str) -> str:
    """What tells this filter from others: its weights and its threshold."""
    return fitted.load(name, KIND, lambda about, _: f"{about['weights_sha256'][:16]} above {about['threshold']:.6g}")


def load(name: str, ckpt: str) -> Filter:
    """Raises InputError if the files are damaged, or of a filter that was fitted on another model."""

    def use(content: dict, tensors: dict) -> Filter:
        if content["model"] != weights_digest(ckpt):
            raise InputError(f"{name}: was fitted on {content['checkpoint']}, not on {ckpt}; fit one on that")
        return Filter(tensors["weight"], tensors["bias"].item(), content["threshold"])

    return fitted.load(name, KIND, use)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("fit", help="on the rows of SFT", formatter_class=Help)
    add = command.add_argument
    add("--ckpt", required=True, help="model directory")
    add("--data", nargs="+", required=True, help="rows to learn from (.jsonl), those of SFT")
    add("--heldout", nargs="+", required=True, help="rows to set the threshold by, of other prompts")
    add("--false-alarms", type=between(0, 1, float), default=0.01, help="share of the held-out chosen answers, at most")
    add("--max-length", type=positive, default=1024, help="longest sequence in tokens; longer ones are cut")
    add("--out", required=True, metavar="NAME", help="writes NAME.json and NAME.safetensors")
    add_device(command)
    args = parser.parse_args()
    fitted.check_out(args.out, KIND)
    tok, model = load_tokenizer(args.ckpt), load_model(args.ckpt, args.device, getattr(torch, args.dtype))
    data, heldout = (labelled(paths, tok, args.max_length) for paths in (args.data, args.heldout))
    watching = fit(model, data)
    peaks = {True: [], False: []}
    for prompt, answer, unsafe in heldout:
        peaks[unsafe].append(watching.peak(model, prompt, answer))
    watching.threshold = threshold_for(peaks[False], args.false_alarms)
    caught, alarms = (sum(peak > watching.threshold for peak in peaks[unsafe]) for unsafe in (True, False))
    content = {"kind": KIND, **made_by(), "checkpoint": args.ckpt, "model": weights_digest(args.ckpt)}
    content |= {"answers": len(data), "threshold": watching.threshold, "false_alarms_at_most": args.false_alarms}
    counts = {"chosen": len(peaks[False]), "false_alarms": alarms, "rejected": len(peaks[True]), "caught": caught}
    tensors = {"weight": watching.weight, "bias": torch.tensor(watching.bias)}
    about = fitted.save(args.out, tensors, content | {"heldout": counts})
    say(f"held out: alarm on {caught} of {len(peaks[True])} unsafe answers and {alarms} of {len(peaks[False])} others")
    print(f"evaluate with --filter {about}")


if __name__ == "__main__":
    run(main)
