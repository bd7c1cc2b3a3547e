"""The steps that bench_sampler_step measures, part by part, all on one model.

One step is what a trainer does with responses that are there: what it needs to know of them before
it updates, forward, loss, backward, clipping and AdamW, sequence by sequence. The learning rate is
0, so every step finds the same model; AdamW does all of its work.

B sequences, P prompt width, L response width, T = B * L, D hidden, V vocabulary, N pairs of a token
and an id of its set.
"""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import entropy_kernels as ek
from benchmarks import train_step
from benchmarks.peers import heads
from entropy_kernels._bench.rounds import status, why_no_peak
from entropy_kernels._bench.step import EagerHead
from entropy_kernels.testing import Watch, products
from trainer.batch import Batch, Rollouts, micro_batches, pack
from trainer.config import Algorithm, Config, Optimizer
from trainer.policy import Policy
from trainer.ranks import Ranks
from trainer.update import at_least, score, update

CPU = torch.device("cpu")
FRACTION = 0.2
Source = Literal["old", "mask", "sampler"]
# What a step knows: all by a scoring pass; the mask by the sampler, and the old log-probs of its
# tokens by a scoring pass; all by the sampler.
SOURCES: dict[Source, dict[str, Any]] = {
    "old": {"old_logprob": "recomputed", "entropy_source": "old"},
    "mask": {"old_logprob": "recomputed", "entropy_source": "sampler"},
    "sampler": {"old_logprob": "sampler", "entropy_source": "sampler"},
}
MakeKept = Callable[[Policy, Rollouts], ek.Support]
CLEAR_REFS = Path("/proc/self/clear_refs")
PARTS = ("scoring", "scoring head", "forward", "head", "backward", "embedding", "optimizer")
# Sets of one, the mean of all, and the size that 1% of the sets exceed.
SINGLETONS, MEAN_SIZE, LARGE_SIZE = 0.5, 8.0, 80.0


class Shape(NamedTuple):
    """Sizes of model and batch."""

    model: str
    """"qwen3", as Qwen3-0.6B, or "gemma3", as Gemma 3 270M."""
    sequences: int
    prompt: int
    response: int
    layers: int
    hidden: int
    vocabulary: int

    @property
    def tokens(self) -> int:
        """T."""
        return self.sequences * self.response


def make_policy(shape: Shape) -> Policy:
    """A model of random weights, tied and with checkpointed layers."""
    if shape.model == "qwen3":
        return train_step.make_policy(train_step.Shape(*shape[1:]))
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    settings = Gemma3TextConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=16 * shape.hidden // 5,
        num_hidden_layers=shape.layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=512,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
        pad_token_id=train_step.PAD,
        eos_token_id=train_step.EOS,
        bos_token_id=None,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(settings)
    # Its norm multiplies by 1 + weight.
    torch.nn.init.constant_(model.model.norm.weight, train_step.SPREAD - 1)
    return train_step.as_policy(model)


def set_sizes(tokens: int) -> Tensor:
    """Sizes of sets, int64 [T], ascending: half of one id, the others log-normal, all of mean 8.

    The normal distribution's quantiles give them, so every number of tokens has the same mix.
    """
    ones = round(SINGLETONS * tokens)
    quantile = (torch.arange(tokens - ones) + 0.5) / (tokens - ones)
    normal = torch.special.ndtri(quantile.double())
    # Two ids at least, and m = exp(mu + s^2 / 2) more in the mean; of 2 + exp(mu + s z) ids, the
    # quantile z of LARGE_SIZE gives s.
    more = (MEAN_SIZE - SINGLETONS) / (1 - SINGLETONS) - 2
    z = float(torch.special.ndtri(torch.tensor(1 - 0.01 / (1 - SINGLETONS)).double()))
    gap = torch.tensor((LARGE_SIZE - 2) / more).log()
    s = float(z - (z * z - 2 * gap).sqrt())
    tail = (normal * s + (torch.tensor(more).log() - s * s / 2)).exp()
    tail = 2 + (tail * more / tail.mean()).round().long()
    return torch.cat([torch.ones(ones, dtype=torch.long), tail])


def make_sets(entropy_T: Tensor, target_T: Tensor, vocabulary: int) -> ek.Support:
    """Random sets with each token's target; the higher its entropy, the larger its set."""
    size_T = torch.empty_like(target_T)
    size_T[entropy_T.argsort()] = set_sizes(len(target_T)).clamp_max(vocabulary // 2)
    draw, sets = random.Random(0), []
    for target, size in zip(target_T.tolist(), size_T.tolist(), strict=True):
        others = draw.sample(range(vocabulary), size)
        sets.append(sorted({target, *[x for x in others if x != target][: size - 1]}))
    return ek.Support.of(sets)


def random_bench(shape: Shape) -> "Bench":
    """A model of random weights and random responses; micro-batches of one sequence."""

    def make_kept(_: Policy, rollouts: Rollouts) -> ek.Support:
        return make_sets(rollouts.sampler_entropy_T, rollouts.response_T, shape.vocabulary)

    rollouts = train_step.make_rollouts(train_step.Shape(*shape[1:]))
    return Bench(make_policy(shape), rollouts, make_kept, shape.prompt + shape.response)


@dataclass
class Parts:
    """Seconds, peaks of resident memory and counted products of a step, by part.

    "embedding" is its gradient, and clipping.
    A part lasts until the next begins. Peaks are above what was there before the step.
    """

    watch: Watch | None = None
    """Counts products where it is given; then no time is worth anything."""
    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    now: str = ""
    _base: int = 0
    _began: tuple[float, int] = (0.0, 0)

    def begin(self, name: str) -> None:
        """Ends the part that is under way, if any; "" begins none."""
        at = time.perf_counter()
        count = products() + (self.watch.products if self.watch else 0)
        if self.now:
            began, counted = self._began
            self.seconds[self.now] = self.seconds.get(self.now, 0.0) + at - began
            self.counts[self.now] = self.counts.get(self.now, 0) + count - counted
        if why_no_peak(CPU) is None:
            if self.now:
                peak = status("VmHWM") - self._base
                self.peaks[self.now] = max(self.peaks.get(self.now, 0), peak)
            else:
                self._base = status("VmRSS")
            CLEAR_REFS.write_text("5")
        self.now, self._began = name, (time.perf_counter(), count)


class Bench:
    """One model with AdamW's moments, responses, and what a sampler would tell of them."""

    def __init__(
        self, policy: Policy, rollouts: Rollouts, make_kept: MakeKept, tokens_per_micro_batch: int
    ):
        self.policy, self.ranks, self.parts = policy, Ranks(CPU), Parts()
        self.optimizer = train_step.make_optimizer(policy.model, rate=0.0)
        self.advantage_B = torch.linspace(-1, 1.5, len(rollouts))
        self.tokens_per_micro_batch = tokens_per_micro_batch
        self._tap()
        self.rollouts = self._told(rollouts)
        kept = make_kept(policy, self.rollouts)
        self.truncated = self._told(replace(self.rollouts, kept=kept))

    @property
    def unit(self) -> int:
        """One product of T x D x V."""
        return len(self.rollouts.sampler_logprob_T) * self.weight.numel()

    @property
    def weight(self) -> Tensor:
        """The tied weight of embedding and head, [V, D]."""
        return self.policy.model.get_input_embeddings().weight

    def _told(self, rollouts: Rollouts) -> Rollouts:
        """The same with the log-probs and entropies of an exact sampler."""
        found = score(self.policy, rollouts, self.settings("old"), self.ranks)
        return replace(
            rollouts, sampler_logprob_T=found.logprob_T, sampler_entropy_T=found.entropy_T
        )

    def settings(self, source: Source, fraction: float = FRACTION) -> Config:
        """Those of a step that trains on `fraction` of the tokens and knows what `source` says."""
        return Config(
            algorithm=replace(Algorithm(), fraction=fraction, **SOURCES[source]),
            optimizer=Optimizer(
                tokens_per_micro_batch=self.tokens_per_micro_batch, grad_clip=train_step.GRAD_CLIP
            ),
        )

    def _tap(self) -> None:
        """Tells `self.parts` where the backbone ends, where its backward begins and ends."""
        lm_head = self.policy.lm_head
        states = lm_head.hidden_states

        def hidden_states(*args: Any, **options: Any) -> Tensor:
            trains = torch.is_grad_enabled()
            self.parts.begin("forward" if trains else "scoring")
            hidden = states(*args, **options)
            if trains:
                hidden.register_hook(lambda _: self.parts.begin("backward"))
            self.parts.begin("head" if trains else "scoring head")
            return hidden

        object.__setattr__(lm_head, "hidden_states", hidden_states)
        embedding = self.policy.model.get_input_embeddings()
        embedding.register_forward_hook(self._before_the_embedding)
        self.optimizer.register_step_pre_hook(lambda *_: self.parts.begin("optimizer"))

    def _before_the_embedding(self, _: Any, inputs: Any, found: Tensor) -> None:
        if torch.is_grad_enabled():
            found.register_hook(lambda _: self.parts.begin("embedding"))

    def run(self, step: "Callable[[Bench], dict[str, float]]", parts: Parts) -> dict[str, float]:
        """The loss and the norm of the gradient of a step, whose parts `parts` has afterwards."""
        self.parts = parts
        parts.begin("scoring")
        try:
            found = step(self)
        finally:
            parts.begin("")
            self.parts = Parts()
        return found


def ours(
    bench: Bench, source: Source, truncated: bool = False, fraction: float = FRACTION
) -> dict[str, float]:
    """The trainer's step, on `fraction` of the tokens."""
    settings = bench.settings(source, fraction)
    rollouts = bench.truncated if truncated else bench.rollouts
    logprob_T, entropy_T = rollouts.sampler_logprob_T, rollouts.sampler_entropy_T
    threshold = ek.entropy_threshold(entropy_T, fraction=fraction)
    selected_T = at_least(entropy_T, threshold)
    if source == "mask":
        logprob_T = score(bench.policy, rollouts, settings, bench.ranks, selected_T).logprob_T
    elif source == "old":
        logprob_T, entropy_T, threshold, _ = score(bench.policy, rollouts, settings, bench.ranks)
        selected_T = at_least(entropy_T, threshold)
    batch = Batch(rollouts, bench.advantage_B, logprob_T, selected_T, threshold)
    bench.parts.begin("embedding")  # its gradient is made before the forward
    found, _ = update(bench.policy, bench.optimizer, batch, settings, bench.ranks)
    return {name: found[name] for name in ("loss", "grad_norm")}


def eager(
    bench: Bench,
    truncated: bool = False,
    head: EagerHead | None = None,
    known: bool = False,
    fraction: float = FRACTION,
) -> dict[str, float]:
    """All logits of a micro-batch at a time, by TRL's functions, or `head`; the mask multiplies.

    With `truncated` logits outside of a token's set are -inf. With `known` there is no scoring
    pass: log-probs and entropies are the sampler's, so a head without entropies is enough.
    """
    policy, algorithm = bench.policy, bench.settings("old").algorithm
    rollouts = bench.truncated if truncated else bench.rollouts
    old_T, entropy_T = rollouts.sampler_logprob_T, rollouts.sampler_entropy_T
    if not known:
        policy.train(False)
        old_T, entropy_T = torch.empty_like(old_T), torch.empty_like(entropy_T)
        with torch.no_grad():
            for _, part, at in _micro_batches(bench, rollouts):
                old_T[at], entropy_T[at] = _eager_head(policy, part, truncated, head)
    selected_T = at_least(entropy_T, ek.entropy_threshold(entropy_T, fraction=fraction))
    policy.train()
    total = 0.0
    for index, part, at in _micro_batches(bench, rollouts):
        logprob_T, _ = _eager_head(policy, part, truncated, head)
        ratio_T = (logprob_T - old_T[at]).exp()
        clipped_T = ratio_T.clamp(1 - algorithm.clip_low, 1 + algorithm.clip_high)
        advantage_T = bench.advantage_B[index].repeat_interleave(part.response_length_B)
        objective_T = torch.minimum(ratio_T * advantage_T, clipped_T * advantage_T)
        loss = -(objective_T * selected_T[at]).sum() / selected_T.sum()
        loss.backward()
        total += float(loss.detach())
    limit = train_step.GRAD_CLIP
    norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), limit)
    bench.optimizer.step()
    bench.optimizer.zero_grad()
    return {"loss": total, "grad_norm": float(norm)}


def _micro_batches(bench: Bench, rollouts: Rollouts) -> Iterator[tuple[Tensor, Rollouts, Tensor]]:
    """Numbers of the sequences of each micro-batch, their rollouts, their places in T."""
    for index in micro_batches(rollouts, bench.tokens_per_micro_batch, bench.ranks):
        yield index, rollouts.rows(index), rollouts.places(index)


def _eager_head(
    policy: Policy, part: Rollouts, truncated: bool, head: EagerHead | None
) -> tuple[Tensor, Tensor | None]:
    """Log-probs and entropies of the responses of one micro-batch."""

    def of(found: ek.Head) -> tuple[Tensor, Tensor | None]:
        if truncated:
            return _masked_head(found.hidden, found.weight, part)
        return (head or heads()[0].head)(found.hidden, found.weight, part.response_T)

    return policy(pack(part, policy.layout), 1.0, of)


def _masked_head(hidden_TD: Tensor, weight_VD: Tensor, part: Rollouts) -> tuple[Tensor, Tensor]:
    """Plain PyTorch, with logits of -inf outside of the sets."""
    kept = part.kept
    assert kept is not None
    row_N = torch.arange(len(hidden_TD)).repeat_interleave(kept.sizes)
    away_TV = torch.ones(len(hidden_TD), len(weight_VD), dtype=torch.bool)
    away_TV[row_N, kept.token_ids] = False
    logp_TV = (hidden_TD @ weight_VD.T).masked_fill(away_TV, -torch.inf).log_softmax(1)
    with torch.no_grad():
        entropy_T = torch.special.entr(logp_TV.exp()).sum(1)
    return logp_TV.gather(1, part.response_T.unsqueeze(1)).squeeze(1), entropy_T
