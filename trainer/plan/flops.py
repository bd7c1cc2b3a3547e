"""Floating-point operations of a step, by part. Products of matrices alone; a multiply-add is two.

T tokens, D hidden, V vocabulary; a unit of the head is one product of T x D x V, 2TDV flops.
"""

from typing import NamedTuple

from trainer.config import sources
from trainer.plan.job import Job

# Products of scores with attention's three operands in backward, by those of forward: two to one,
# and flash attention computes the scores once more.
ATTENTION_BACKWARD = {"eager": 2.0}
FLASH_BACKWARD = 2.5


class Flops(NamedTuple):
    """Flops of a whole step on all GPUs."""

    prefill: float
    decode: float
    score_backbone: float
    score_head: float
    forward: float
    backward: float
    recompute: float
    """Forward of activations that were not stored, computed again."""
    update_head: float

    @property
    def rollout(self) -> float:
        return self.prefill + self.decode

    @property
    def score(self) -> float:
        return self.score_backbone + self.score_head

    @property
    def update(self) -> float:
        return self.forward + self.backward + self.recompute + self.update_head


def head_units(job: Job) -> float:
    """Units of the head in an update, each over all response tokens: see docs/method.md."""
    fraction = job.trained
    if job.mask_known:
        return (3 if job.stored_logits else 4) * fraction
    return 1 + 3 * fraction


def scoring_units(job: Job) -> float:
    """Units of the head in the scoring passes of a step, over the selected tokens or all."""
    if not sources(job.config).score_selected:
        return job.scoring_passes
    return job.comparisons + (1 - job.comparisons) * job.config.algorithm.share


def unit(job: Job) -> float:
    """Flops of one product of all response tokens with the head."""
    return 2.0 * job.sequences * job.response * job.architecture.head


def sampling_flops(job: Job, prompts: int, sequences: int) -> tuple[float, float]:
    """Flops of reading `prompts`, each once per group, and of decoding `sequences` responses."""
    model, prompt, response = job.architecture, job.assumptions.prompt, job.response
    per_token = 2.0 * model.layers * model.layer_matrices
    pair = 4.0 * model.layers * model.heads * model.head_dim  # scores and their sum of values
    # Pairs of a token and one before it, over a response: a longer one has more of them.
    pairs = prompt * response + job.lengths.second_moment / 2
    prefill = prompts * (prompt * (per_token + pair * prompt / 2) + 2.0 * model.head)
    return prefill, sequences * (response * (per_token + 2.0 * model.head) + pair * pairs)


def step_flops(job: Job) -> Flops:
    """Flops of one step of `job`."""
    prefill, decode = sampling_flops(job, job.config.rollout.prompts, job.sequences)
    products, attention = _forward(job)
    forward = products + attention
    # Nothing in backward needs the result of a layer's last product.
    recompute = forward - _last_product(job)
    factor = ATTENTION_BACKWARD.get(job.config.model.attention, FLASH_BACKWARD)
    return Flops(
        prefill=job.rounds * prefill,
        decode=job.rounds * decode,
        score_backbone=job.scoring_passes * forward,
        score_head=scoring_units(job) * unit(job),
        forward=forward,
        backward=2 * products + factor * attention,
        recompute=recompute if job.config.model.gradient_checkpointing else 0.0,
        update_head=head_units(job) * unit(job),
    )


def _forward(job: Job) -> tuple[float, float]:
    """Forward flops of the backbone on all trained sequences: products with weights, attention."""
    model = job.architecture
    tokens = job.sequences * (job.assumptions.prompt + job.response)
    # eager computes all pairs of positions; the others only those that are not masked.
    share = 1.0 if job.config.model.attention == "eager" else 0.5
    pairs = share * job.sequences * job.squared_length
    products = 2.0 * model.layers * model.layer_matrices * tokens
    return products, 4.0 * model.layers * model.heads * model.head_dim * pairs


def _last_product(job: Job) -> float:
    """Forward flops of the last product of each layer, the MLP's second."""
    model = job.architecture
    tokens = job.sequences * (job.assumptions.prompt + job.response)
    return 2.0 * model.layers * model.hidden * model.intermediate * tokens
