"""The policy: a transformers causal LM whose head we run ourselves.

B sequences, P prompt width, L response width, D hidden, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

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
        ids = self.model.generation_config.eos_token_id
        if ids is None:
            ids = self.tokenizer.eos_token_id
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

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter by its name, whole; a tied one once."""
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach()

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

    Dropout is off, in training too: ratios compare the policy with the one that sampled, and
    would be noise with another network each time.

    Raises:
        ValueError: a path that cannot be loaded, a tokenizer without an end-of-sequence, a head
            that linear_logprob_entropy does not reproduce.
    """
    dtype = getattr(torch, settings.dtype)
    if settings.path == "tiny":
        model, tokenizer = build_tiny(seed, settings.attention, dtype)
    else:
        model, tokenizer = _from_pretrained(settings, dtype)
    if settings.gradient_checkpointing:
        # Its name changed within transformers 5.
        old = model.gradient_checkpointing_enable
        getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False})
    policy = Policy(model.to(device), tokenizer)
    _check_head(policy)
    return policy


def _from_pretrained(settings: config.Model, dtype: torch.dtype) -> tuple[Any, Any]:
    path = settings.path
    try:
        architecture = AutoConfig.from_pretrained(path)
        for part in (architecture, architecture.get_text_config()):
            for name, value in vars(part).items():
                if "drop" in name and isinstance(value, float):
                    setattr(part, name, 0.0)
        model = AutoModelForCausalLM.from_pretrained(
            path, config=architecture, dtype=dtype, attn_implementation=settings.attention
        )
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    except OSError as error:
        raise ValueError(f"no model can be loaded from model.path {path!r}: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {path} has no end-of-sequence token; it needs one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


@torch.no_grad()
def _check_head(policy: Policy) -> None:
    """Our head must give the log-probabilities of the model's own logits."""
    head = policy.head(1.0)
    tokens = torch.arange(8, device=policy.device).unsqueeze(0) % len(head["weight"])
    logits = policy.model(input_ids=tokens, use_cache=False).logits[0].float()
    hidden = policy.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0]
    got = ek.linear_logprob_entropy(hidden, target=tokens[0], **head).logprob
    want = logits.log_softmax(1).gather(1, tokens[0].unsqueeze(1)).squeeze(1)
    # The model rounds its logits to its dtype, a few times with a softcap; all else is fp32.
    largest = logits.abs().max()
    tolerance = 4 * torch.finfo(policy.model.dtype).eps * largest
    tolerance += 64 * torch.finfo(torch.float32).eps * largest.clamp_min(1)
    if not ((got - want).abs() <= tolerance).all():
        raise ValueError(
            f"the head of {type(policy.model).__name__} is not softcap(h W^T + b) * scale as its "
            f"configuration says: log-probs differ by {float((got - want).abs().max()):.2e}"
        )
