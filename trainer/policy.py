"""The policy: a transformers causal LM whose head we run ourselves.

T response tokens, D hidden, V vocabulary; R rows and W their width as in packing.py.
"""

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import entropy_kernels as ek
from entropy_kernels.integrations.hf import LMHead, lm_head
from trainer import config
from trainer.fsdp import release, whole
from trainer.packing import Layout, Packed, arrange
from trainer.tiny import build_tiny

Result = TypeVar("Result")

# glibc's name of the setting, and the size from which on blocks are the system's and not its own.
M_MMAP_THRESHOLD, MMAP_THRESHOLD = -3, 4 << 20


class Policy(nn.Module):
    """A model, its tokenizer, and its head, which `lm_head` finds.

    The root of what FSDP2 shards: embedding, last norm and head are whole inside of `forward`.
    """

    model: Any
    tokenizer: Any
    lm_head: LMHead
    layout: Layout
    """How micro-batches are packed; `choose_layout` finds it."""
    compute_dtype: torch.dtype | None
    """Of its arithmetic, where it is not that of the weights."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.tokenizer, self.lm_head = model, tokenizer, lm_head(model)
        self.layout, self.compute_dtype = "padded", None

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def eos_ids(self) -> Tensor:
        """Token ids that end a response, on the CPU."""
        ids = self.model.generation_config.eos_token_id
        if ids is None:
            ids = self.tokenizer.eos_token_id
        return torch.tensor(ids).reshape(-1)

    def materialize(self, device: torch.device) -> None:
        """Move all to `device`, where weights on "meta" get memory, and as yet no values."""
        self._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
        self.model.tie_weights()  # each of a tied pair has got its own

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter by its name, whole, in the dtype of the arithmetic; a tied one once.

        Collective where the policy is sharded: each parameter is gathered when it is asked for.
        """
        for name, parameter in self.model.named_parameters():
            yield name, whole(parameter.detach().to(self.compute_dtype or parameter.dtype))

    def forward(
        self,
        packed: Packed,
        temperature: float,
        fn: Callable[[Tensor, dict[str, Any]], Result],
    ) -> Result:
        """fn(hidden_TD, head): the state that predicts each response token, and the other options
        of `linear_logprob_entropy` for this head.

        Sharded, the weights in `head` are whole until the backward of what `fn` returns.
        """
        options = {} if packed.mask_RW is None else {"attention_mask": packed.mask_RW.long()}
        hidden_RWD = self.lm_head.hidden_states(
            input_ids=packed.tokens_RW,
            position_ids=packed.positions_RW,
            use_cache=False,
            **options,
        )
        hidden_TD = hidden_RWD.flatten(0, 1).index_select(0, packed.index_T)
        head = self.lm_head(hidden_TD, temperature)
        return fn(head.pop("hidden"), head)


def positions(mask: Tensor) -> Tensor:
    """Position ids of padded sequences: 0 at the first real token."""
    return (mask.long().cumsum(1) - 1).clamp_min(0)


def load_policy(settings: config.Model, seed: int, device: torch.device) -> Policy:
    """The policy of `settings`, on `device`, checked and ready to train; as `read_policy`.

    Raises:
        ValueError: as `read_policy` and `check_policy`.
    """
    policy = read_policy(settings, seed).to(device)
    check_policy(policy)
    return policy


def read_policy(settings: config.Model, seed: int, *, empty: bool = False) -> Policy:
    """The model and tokenizer of `settings.path`, on the CPU, unchecked.

    With `empty` weights are not read. Those of a folder are on "meta": they take no memory until
    they are sharded and `Policy.materialize` gives them some.

    Dropout is off, in training too: ratios compare the policy with the one that sampled, and
    would be noise with another network each time.

    Raises:
        ValueError: a path that cannot be loaded, a tokenizer without an end-of-sequence.
    """
    dtype = getattr(torch, settings.dtype)
    if settings.path == "tiny":
        model, tokenizer = build_tiny(seed, settings.attention, dtype)
    else:
        model, tokenizer = _from_folder(settings, dtype, empty)
    if settings.gradient_checkpointing:
        checkpoint_activations(model)
    return Policy(model, tokenizer)


def checkpoint_activations(model: Any) -> None:
    """Let backward recompute the activations of each layer, and freed memory go back at once.

    glibc keeps blocks of up to 32 MiB between others that stay: 1.4 GB in a step of 0.6 B
    parameters on 2 x 1,024 tokens, on a CPU. A threshold that the environment sets is left.
    """
    # Its name changed within transformers 5.
    old = model.gradient_checkpointing_enable
    getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False})
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)


def check_policy(policy: Policy) -> None:
    """Check the head of `policy`, and find how its micro-batches are packed.

    Collective where the policy is sharded.

    Raises:
        ValueError: a head that linear_logprob_entropy does not reproduce.
    """
    _check_head(policy)
    policy.layout = _layout(policy)
    release(policy)


def _from_folder(settings: config.Model, dtype: torch.dtype, empty: bool) -> tuple[Any, Any]:
    path, options = settings.path, {"dtype": dtype, "attn_implementation": settings.attention}
    try:
        architecture = AutoConfig.from_pretrained(path)
        for part in (architecture, architecture.get_text_config()):
            for name, value in vars(part).items():
                if "drop" in name and isinstance(value, float):
                    setattr(part, name, 0.0)
        if empty:
            with init_empty_weights(include_buffers=False):
                model = AutoModelForCausalLM.from_config(architecture, **options).eval()
            model.tie_weights()
            model.generation_config = GenerationConfig.from_pretrained(path)
        else:
            model = AutoModelForCausalLM.from_pretrained(path, config=architecture, **options)
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

    def compare(hidden_TD: Tensor, head: dict[str, Any]) -> None:
        logits = policy.model(input_ids=tokens[None], use_cache=False).logits[0]
        got = ek.linear_logprob_entropy(hidden_TD, target=tokens, **head).logprob
        want = logits.float().log_softmax(1).gather(1, tokens.unsqueeze(1)).squeeze(1)
        # The model rounds its logits to its dtype, a few times with a softcap; all else is fp32.
        largest = logits.float().abs().max()
        tolerance = 4 * torch.finfo(logits.dtype).eps * largest
        tolerance += 64 * torch.finfo(torch.float32).eps * largest.clamp_min(1)
        if not ((got - want).abs() <= tolerance).all():
            raise ValueError(
                f"the head of {type(policy.model).__name__} is not the softcap(h W^T + b) * scale "
                f"that was measured: log-probs differ by {float((got - want).abs().max()):.2e}"
            )

    tokens = _some_tokens(policy, 8)
    policy(arrange(tokens, torch.tensor([8]), "padded"), 1.0, compare)


@torch.no_grad()
def _layout(policy: Policy) -> Layout:
    """Rows of several sequences, if hidden states are then those of the sequences alone.

    They are within rounding, which is that of an unknown number of 16-bit operations: far closer
    than without any boundary between the sequences.
    """
    tokens, apart = _some_tokens(policy, 14), torch.tensor([7, 4, 3])

    def hidden(length_B: Tensor, layout: Layout) -> Tensor:
        return policy(arrange(tokens, length_B, layout), 1.0, lambda hidden, _: hidden.float())

    by_lengths = config.is_flash(policy.model.config._attn_implementation)
    layout: Layout = "row" if by_lengths else "rows"
    alone = hidden(apart, "padded")
    packed, joined = (
        (hidden(length_B, layout) - alone).abs().max()
        for length_B in (apart, torch.tensor([len(tokens)]))
    )
    rounding = 64 * torch.finfo(torch.float32).eps * alone.abs().max()
    return layout if packed <= torch.maximum(joined / 16, rounding) else "padded"


def _some_tokens(policy: Policy, count: int) -> Tensor:
    return (
        torch.arange(count, device=policy.device) % policy.model.config.get_text_config().vocab_size
    )
