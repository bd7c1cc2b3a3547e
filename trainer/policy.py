"""The policy: a transformers causal LM whose head we run ourselves.

B sequences, P prompt width, L response width, D hidden, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import entropy_kernels as ek
from trainer import config
from trainer.tiny import build_tiny
from trainer.types import Rollouts


@dataclass
class Policy:
    """A model, its tokenizer, and how its head turns hidden states into logits."""

    model: Any
    tokenizer: Any

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def eos_ids(self) -> Tensor:
        """Token ids that end a response."""
        ids = self.model.generation_config.eos_token_id or self.tokenizer.eos_token_id
        return torch.tensor(ids, device=self.device).reshape(-1)

    def head(self, temperature: float) -> dict[str, Any]:
        """Options of `linear_logprob_entropy` for this head, by the model's configuration."""
        embeddings = self.model.get_output_embeddings()
        settings = self.model.config.get_text_config()
        scale = getattr(settings, "logit_scale", None) or 1.0
        scale /= getattr(settings, "logits_scaling", None) or 1.0
        return {
            "weight": embeddings.weight,
            "bias": getattr(embeddings, "bias", None),
            "softcap": getattr(settings, "final_logit_softcapping", None),
            "temperature": temperature / scale,
        }

    def response_hidden(self, rollouts: Rollouts) -> Tensor:
        """Hidden states [B, L, D]: the one at [b, l] predicts response token l."""
        tokens = torch.cat([rollouts.prompt_BP, rollouts.response_BL[:, :-1]], 1)
        mask = torch.cat([rollouts.prompt_mask_BP, rollouts.mask_BL[:, :-1]], 1)
        hidden = self.model.base_model(
            input_ids=tokens,
            attention_mask=mask.long(),
            position_ids=positions(mask),
            use_cache=False,
        ).last_hidden_state
        return hidden[:, rollouts.prompt_BP.shape[1] - 1 :]


def positions(mask: Tensor) -> Tensor:
    """Position ids of padded sequences: 0 at the first real token."""
    return (mask.long().cumsum(1) - 1).clamp_min(0)


def load_policy(settings: config.Model, seed: int, device: torch.device) -> Policy:
    """The model and tokenizer of `settings.path`, on `device`, ready to train.

    Raises:
        ValueError: a head that linear_logprob_entropy does not reproduce.
    """
    dtype = getattr(torch, settings.dtype)
    if settings.path == "tiny":
        model, tokenizer = build_tiny(seed, settings.attention, dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            settings.path, dtype=dtype, attn_implementation=settings.attention
        )
        tokenizer = AutoTokenizer.from_pretrained(settings.path, padding_side="left")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(model.to(device), tokenizer)
    _check_head(policy)
    return policy


@torch.no_grad()
def _check_head(policy: Policy) -> None:
    """Our head must give the log-probabilities of the model's own logits."""
    tokens = torch.arange(8, device=policy.device).unsqueeze(0) % policy.model.vocab_size
    logits = policy.model(input_ids=tokens, use_cache=False).logits[0].float()
    hidden = policy.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0]
    got = ek.linear_logprob_entropy(hidden, target=tokens[0], **policy.head(1.0)).logprob
    want = logits.log_softmax(1).gather(1, tokens[0].unsqueeze(1)).squeeze(1)
    tolerance = 64 * torch.finfo(policy.model.dtype).eps * logits.abs().max().clamp_min(1)
    if not ((got - want).abs() <= tolerance).all():
        raise ValueError(
            f"the head of {type(policy.model).__name__} is not softcap(h W^T + b) * scale as its "
            f"configuration says: log-probs differ by {float((got - want).abs().max()):.2e}"
        )
