"""The policy: a transformers causal LM whose head we run ourselves.

T response tokens, D hidden, V vocabulary; R rows and W their width as in batch.py.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import entropy_kernels as ek
from entropy_kernels.integrations.hf import LMHead, lm_head
from trainer import config
from trainer.batch import Layout, Packed, arrange
from trainer.fsdp import release, whole
from trainer.model.folder import Files, read_folder
from trainer.model.modes import checkpoint_activations, without_noise
from trainer.model.probes import check_states, choose_layout, some_tokens
from trainer.model.rope import fix_rope, longest_sequence
from trainer.model.tokens import end_ids
from trainer.tiny.model import build_tiny

Result = TypeVar("Result")


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
    """The dtype of its arithmetic, if it is not the weights'."""
    rope: list[str]
    """The kinds of scaling of positions that depend on `longest`."""
    files: Files
    """The files of settings that came with it, to be saved with checkpoints."""
    chat: bool
    """Whether the chat template writes prompts; then its end of turn ends a response."""
    longest: int | None
    """The most tokens of a prompt and its response together; None: any number."""

    def __init__(self, model: Any, tokenizer: Any, longest: int = 0) -> None:
        """Positions are scaled for `longest` tokens; 0: for the model's own number."""
        super().__init__()
        self.model, self.tokenizer, self.lm_head = model, tokenizer, lm_head(model)
        self.layout, self.compute_dtype, self.chat, self.files = "padded", None, False, {}
        self.longest = longest_sequence(model.config.get_text_config(), longest)
        self.rope = fix_rope(model, self.longest)
        without_noise(model)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def eos_ids(self) -> Tensor:
        """Token ids that end a response, on the CPU; see `end_ids`."""
        return torch.tensor(end_ids(self.tokenizer, self.model, self.chat))

    def notes(self) -> list[str]:
        """Lines on what may be unexpected; call after `check_policy`."""
        name, notes = type(self.model).__name__, []
        if self.layout == "padded":
            notes.append(f"{name} does not keep packed sequences apart: one sequence a row\n")
        if self.rope:
            notes.append(
                f"positions of {name} are scaled by {' and '.join(self.rope)} for sequences of "
                f"{self.longest:,} tokens, in shorter ones too; engine.max_model_len sets this\n"
            )
        return notes

    def materialize(self, device: torch.device) -> None:
        """Move all to `device`; weights on "meta" get memory there, but no values yet."""
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
        fn: Callable[[ek.Head], Result],
    ) -> Result:
        """fn(head), whose states predict the tokens of `packed.target_T`.

        If sharded, the head's weights are whole until the backward of the result.
        """
        options = {} if packed.mask_RW is None else {"attention_mask": packed.mask_RW.long()}
        hidden_RWD = self.lm_head.hidden_states(
            input_ids=packed.tokens_RW,
            position_ids=packed.positions_RW,
            use_cache=False,
            **options,
        )
        hidden_TD = hidden_RWD.flatten(0, 1).index_select(0, packed.index_T)
        return fn(self.lm_head(hidden_TD, packed.target_T, temperature))


def positions(mask: Tensor) -> Tensor:
    """Position ids of padded sequences: 0 at the first real token."""
    return (mask.long().cumsum(1) - 1).clamp_min(0)


def read_policy(
    settings: config.Model, seed: int, *, empty: bool = False, longest: int = 0
) -> Policy:
    """The model and tokenizer of `settings.path`, on the CPU, unchecked; `longest` as in `Policy`.

    With `empty` weights are not read. Those of a folder are on "meta": they take no memory until
    they are sharded and `Policy.materialize` gives them some.

    Raises:
        ValueError: as `read_folder`.
    """
    files: Files = {}
    if settings.path == "tiny":
        dtype = getattr(torch, settings.dtype)
        model, tokenizer = build_tiny(seed, settings.attention, dtype)
    else:
        model, tokenizer, files = read_folder(settings, empty=empty)
    if settings.gradient_checkpointing:
        checkpoint_activations(model)
    policy = Policy(model, tokenizer, longest)
    policy.files = files
    return policy


def check_policy(policy: Policy, impl: str = "auto") -> None:
    """Check the head and the states of `policy`, and find how its micro-batches are packed.

    `impl` is the backend of the head. Collective where the policy is sharded.

    Raises:
        ValueError: a head that linear_logprob_entropy does not reproduce; states that are noise,
            or that depend on the other sequences of a batch.
    """
    policy.train(False)
    check_states(policy)
    _check_head(policy, impl)
    policy.layout = choose_layout(policy)
    release(policy)


@torch.no_grad()
def _check_head(policy: Policy, impl: str) -> None:
    """Our head must give the log-probabilities of the model's own logits."""

    def compare(head: ek.Head) -> None:
        logits = policy.model(input_ids=tokens[None], use_cache=False).logits[0]
        got = ek.linear_logprob_entropy(head, impl=impl).logprob
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

    tokens = some_tokens(policy, 8)
    policy(arrange(tokens, torch.tensor([8]), "padded"), 1.0, compare)
