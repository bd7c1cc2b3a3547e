"""The steps that bench_train_step measures: the trainer's, and one with eager logits.

B sequences, P prompt width, L response width, T = B * L, D hidden, V vocabulary.
"""

import time
from dataclasses import replace
from typing import Any, NamedTuple

import torch

import entropy_kernels as ek
from benchmarks.peers import heads
from entropy_kernels._bench.others import torch_head, trl_head
from entropy_kernels._bench.step import EagerHead
from trainer.batch import Batch, Rollouts
from trainer.config import Algorithm, Config, Optimizer, Rollout
from trainer.model.modes import checkpoint_activations
from trainer.policy import Policy, check_policy
from trainer.ranks import Ranks
from trainer.tasks.problem import Problem
from trainer.update import at_least, score, update

PAD, EOS = 0, 1
LEARNING_RATE = 1e-6
GRAD_CLIP = 1.0
# The last norm's weight: entropies of random weights then differ by more than rounding.
SPREAD = 6.0


class Shape(NamedTuple):
    """Sizes of model and batch; the rest is as in Qwen3-0.6B."""

    sequences: int
    prompt: int
    response: int
    layers: int
    hidden: int
    vocabulary: int


def make_policy(shape: Shape) -> Policy:
    """A Qwen3-0.6B with the shape's layers, width and vocabulary, random weights, checkpointing."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    heads = max(shape.hidden // 64, 2)
    settings = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=3 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=128,
        max_position_embeddings=40_960,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(settings)
    torch.nn.init.constant_(model.model.norm.weight, SPREAD)
    return as_policy(model)


def as_policy(model: Any) -> Policy:
    """The checked policy of a causal LM, with checkpointing and a tokenizer of three words."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    checkpoint_activations(model)
    words = Tokenizer(models.WordLevel({"<pad>": PAD, "<eos>": EOS, "<unk>": 2}, "<unk>"))
    named = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    policy = Policy(model, PreTrainedTokenizerFast(tokenizer_object=words, **named))
    check_policy(policy)
    return policy


def make_rollouts(shape: Shape) -> Rollouts:
    """Random tokens; responses of full length."""
    generator = torch.Generator().manual_seed(0)
    B, P, L = shape.sequences, shape.prompt, shape.response
    tokens = torch.randint(2, shape.vocabulary, (B, P + L), generator=generator)
    problem = Problem("", None)
    return Rollouts(
        problems=[problem] * B,
        responses=[""] * B,
        group_B=torch.zeros(B, dtype=torch.long),
        tokens_N=tokens.flatten(),
        prompt_length_B=torch.full((B,), P),
        response_length_B=torch.full((B,), L),
        sampler_logprob_T=torch.zeros(B * L),
        sampler_entropy_T=torch.zeros(B * L),
        truncated_B=torch.ones(B, dtype=torch.bool),
        reward_B=torch.zeros(B),
        timed_out_B=torch.zeros(B, dtype=torch.bool),
        crashed_B=torch.zeros(B, dtype=torch.bool),
    )


class Step:
    """A policy with AdamW's moments in place and a batch, before the step."""

    def __init__(self, shape: Shape, name: str, changes: dict[str, Any]):
        self.head, self.ranks = others().get(name), Ranks(torch.device("cpu"))
        self.policy, rollouts = make_policy(shape), make_rollouts(shape)
        tokens = shape.sequences * (shape.prompt + shape.response)
        self.settings = Config(
            rollout=Rollout(max_new_tokens=shape.response),
            algorithm=replace(Algorithm(), **changes),
            optimizer=Optimizer(tokens_per_micro_batch=tokens, grad_clip=GRAD_CLIP),
        )
        self.optimizer = make_optimizer(self.policy.model)
        old_T, entropy_T, threshold, _ = score(self.policy, rollouts, self.settings, self.ranks)
        noise_T = 0.02 * torch.randn(old_T.shape, generator=torch.Generator().manual_seed(1))
        advantage_B = torch.linspace(-1, 1.5, shape.sequences)
        selected_T = at_least(entropy_T, threshold)
        old_T = (old_T + noise_T).clamp_max(0)
        self.batch = Batch(rollouts, advantage_B, old_T, selected_T, threshold)

    def run(self) -> dict[str, Any]:
        """The optimizer step; what it found, and how much memory the state takes."""
        if self.head is not None:
            loss, norm, seconds = _eager_update(
                self.policy, self.optimizer, self.batch, self.settings, self.head
            )
        else:
            found, seconds = update(
                self.policy, self.optimizer, self.batch, self.settings, self.ranks
            )
            loss, norm = found["loss"], found["grad_norm"]
        weights = sum(p.nbytes for p in self.policy.model.parameters())
        return {
            "sums": {"loss": loss, "grad_norm": norm},
            "head_s": seconds,
            "weights_bytes": weights,
            "gradients_bytes": weights,
            "moments_bytes": 2 * weights,
        }


def others() -> dict[str, EagerHead]:
    """The heads of the steps that are not the trainer's own, by contestant."""
    return {"eager": heads()[0].head, "trl": trl_head, "lce": torch_head}


def make_optimizer(model: Any, rate: float = LEARNING_RATE) -> torch.optim.Optimizer:
    """AdamW whose moments exist, as after every step but the first."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.param_groups[0]["lr"] = rate
    return optimizer


def _eager_update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    settings: Config,
    head: EagerHead,
) -> tuple[float, float, float]:
    """Loss, norm of the gradient, and the seconds of the head; the mask multiplies.

    A head without entropies takes the mask of the batch.
    """
    policy.train()
    rollouts, algorithm = batch.rollouts, settings.algorithm
    prompt = int(rollouts.prompt_length_B[0])  # as long as every other
    tokens = rollouts.tokens_N.view(len(rollouts), -1)[:, :-1]
    hidden = policy.lm_head.hidden_states(input_ids=tokens, use_cache=False)
    began = time.perf_counter()
    leaf = hidden[:, prompt - 1 :].flatten(0, 1).detach().requires_grad_()
    weight = policy.lm_head(leaf, rollouts.response_T).weight
    logprob_T, entropy_T = head(leaf, weight, rollouts.response_T)
    selected_T = batch.selected_T
    if entropy_T is not None:
        selected_T = ek.top_entropy_mask(entropy_T.detach(), fraction=algorithm.fraction)
    ratio_T = (logprob_T - batch.old_logprob_T).exp()
    clipped_T = ratio_T.clamp(1 - algorithm.clip_low, 1 + algorithm.clip_high)
    advantage_T = batch.advantage_B.repeat_interleave(rollouts.response_length_B)
    objective_T = torch.minimum(ratio_T * advantage_T, clipped_T * advantage_T)
    loss = -(objective_T * selected_T).sum() / selected_T.sum()
    loss.backward()
    seconds = time.perf_counter() - began
    gradient = torch.zeros_like(hidden)
    gradient[:, prompt - 1 :] = leaf.grad.view(len(rollouts), -1, hidden.shape[-1])
    del logprob_T, entropy_T
    hidden.backward(gradient)
    norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), settings.optimizer.grad_clip)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach()), float(norm), seconds
