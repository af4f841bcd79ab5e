"""What a search for an attack string minimises, and what it reports. Shared by GCG and AutoDAN.

Shapes: N candidates, m target tokens, V vocabulary.
"""

from dataclasses import dataclass, field

import torch


@dataclass
class Search:
    """What an attack found."""

    text: str = ""  # the best attack string
    targets: list[list[int]] = field(default_factory=list)  # what it is to bring about, for each prompt: ids
    losses: list[float] = field(default_factory=list)  # of the best string, after each step
    evaluations: int = 0  # candidates scored
    success_at: int | None = None  # candidates scored when the sampler first let an unsafe answer survive


@dataclass
class Objective:
    """L(s), from logits."""

    loss: str = "ce"  # or "mellowmax"
    reset_id: int | None = None  # of an attacker who knows about it
    weight: float = 1.0  # λ

    def __call__(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """logits (N, m + 1, V) at the positions that predict y_1 … y_m and what follows; target (m,) -> (N,) fp32."""
        logits, m = logits.float(), len(target)
        wanted = logits[:, :m].gather(-1, target.expand(len(logits), m)[..., None])[..., 0]  # (N, m)
        if self.loss == "mellowmax":  # a soft maximum over the tokens, of raw logits as in nanoGCG: log mean exp(−z)
            total = (-wanted).logsumexp(dim=-1) - torch.tensor(float(m)).log()
        else:
            total = (logits[:, :m].logsumexp(dim=-1) - wanted).mean(dim=-1)  # − mean_t log π(y_t | …)
        if self.reset_id is not None:
            others = torch.cat((logits[..., : self.reset_id], logits[..., self.reset_id + 1 :]), dim=-1)
            no_reset = others.logsumexp(dim=-1) - logits.logsumexp(dim=-1)  # log(1 − π([RESET] | …)), (N, m + 1)
            total = total - self.weight * no_reset.mean(dim=-1)
        return total
