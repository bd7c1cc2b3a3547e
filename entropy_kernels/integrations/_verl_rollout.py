"""What verl's agent loop knows of the tokens that it sampled, carried on to head and loss.

`AgentLoopOutput.extra_fields` reaches the actor with the batch: a field of its own per key in
verl's trainer V0, one field "extra_fields" in V1. The engine's `forward_step` gets it with each
micro-batch, before the model runs.

T rows that the head is given, B sequences, L the longest response.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..head import Head
from ..high_entropy_policy_loss import on_rows
from ..linear_logprob_entropy import linear_logprob_entropy
from ..options import Backend
from ..support import Support

ENTROPIES, SETS = "rollout_entropies", "rollout_sets"


@dataclass
class Known:
    """What is known of a micro-batch's responses."""

    place_BL: Tensor
    """The row of the head that predicts each token."""
    response_BL: Tensor
    """The tokens of responses, those of tools too; the rest is padding."""
    entropy_BL: Tensor | None = None
    support: Support | None = None
    """The sets of the responses' tokens, in order; an empty one where nobody sampled."""
    selected_BL: Tensor | None = None
    alone: bool = False
    """Whether the loss reads the selected tokens alone."""

    def score(self, head: Head, impl: str) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of the head's targets, zeros where none is known or asked for.

        Where the head leaves a response's token out, its entropy is the sampler's.
        """
        target = head.target
        rows_T = target.new_ones(target.numel(), dtype=torch.bool)
        if self.alone:
            rows_T = self._at_rows(self.selected_BL, target.numel())
        rows = rows_T.reshape(target.shape)
        if self.support is None:
            found = on_rows(head, rows, None, Backend(impl=impl))
        else:
            support = self._support_of_rows(target.numel())
            rows = rows & (support.sizes > 0).reshape(target.shape)
            masked = replace(head, target=target.masked_fill(~rows, head.ignore_index))
            found = linear_logprob_entropy(masked, support=support, impl=impl)
        entropy = found.entropy
        if self.alone and self.entropy_BL is not None:
            known_T = entropy.new_zeros(target.numel())
            known_T[self.place_BL[self.response_BL]] = self.entropy_BL[self.response_BL]
            entropy = torch.where(rows, entropy, known_T.reshape(target.shape))
        return found.logprob, entropy

    def _at_rows(self, chosen_BL: Tensor | None, count: int) -> Tensor:
        assert chosen_BL is not None
        rows_T = chosen_BL.new_zeros(count)
        rows_T[self.place_BL[chosen_BL & self.response_BL]] = True
        return rows_T

    def _support_of_rows(self, count: int) -> Support:
        """A set per row of the head: empty but for responses."""
        assert self.support is not None
        ids, ends = self.support.token_ids, self.support.offsets
        with_empty = Support(ids, torch.cat([ends, ends[-1:]]))
        last = len(ends) - 1
        index_T = ends.new_full((count,), last)
        index_T[self.place_BL[self.response_BL]] = torch.arange(last, device=ends.device)
        return with_empty.at(index_T)


class Rollout:
    """The engine's forward_step, with `known` set while it runs.

    `choose(entropy_BL, mask_BL, dp_group)` is the selection of the loss.
    """

    def __init__(self, entropies: bool, sets: bool, choose: Callable[..., Tensor]) -> None:
        self.entropies, self.sets, self._choose = entropies, sets, choose
        self.known: Known | None = None

    def replacements(self) -> list[tuple[Any, str, Any]]:
        """Owner, name and wrapper; none where nothing is read."""
        if not self.entropies and not self.sets:
            return []
        from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

        wrapper = self._around(FSDPEngineWithLMHead.forward_step)
        return [(FSDPEngineWithLMHead, "forward_step", wrapper)]

    def _around(self, forward_step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward_step)
        def forward(self_: Any, micro_batch: Any, loss_function: Any, forward_only: bool) -> Any:
            trained = None if forward_only else loss_function
            with self._reading(self_, micro_batch, trained):
                return forward_step(self_, micro_batch, loss_function, forward_only)

        return forward

    @contextmanager
    def _reading(self, engine: Any, micro_batch: Any, loss_function: Any) -> Iterator[None]:
        self.known = self._read(engine, micro_batch, loss_function)
        try:
            yield
        finally:
            self.known = None

    def _read(self, engine: Any, micro_batch: Any, loss_function: Any) -> Known | None:
        from verl.workers.engine.fsdp import transformer_impl

        config: Any = getattr(loss_function, "keywords", {}).get("config")
        mode = getattr(getattr(config, "policy_loss", None), "loss_mode", None)
        selects = self.entropies and mode == "high_entropy"
        if not selects and not self.sets:
            return None
        divided = getattr(engine, "use_ulysses_sp", False)
        if divided and self.sets:
            raise ValueError("sets=True needs whole sequences; got use_ulysses_sp=True")
        data = micro_batch.to(transformer_impl.get_device_id())
        known, mask_BL = _places(data)
        if self.sets:
            known.support = _support(_field(data, SETS, known, mask_BL), known)
        if selects:
            known.entropy_BL = _entropies(_field(data, ENTROPIES, known, mask_BL), known)
            group = engine.get_data_parallel_group()
            known.selected_BL = self._choose(known.entropy_BL, mask_BL, group)
            of_ppo = loss_function.func.__name__ == "ppo_loss"
            reads_all = config.use_kl_loss or config.entropy_coeff != 0
            known.alone = of_ppo and not reads_all and not divided
        return known


def _places(data: Any) -> tuple[Known, Tensor]:
    """Where the responses' tokens lie, and their mask [B, L], as verl's no_padding_2_padding."""
    from verl.utils import tensordict_utils as tu

    ends_B = data["input_ids"].offsets()
    lengths_B = ends_B.diff()
    responses, mask_BL = data["responses"], data["response_mask"]
    if responses.is_nested:
        counts_B = responses.offsets().diff()
    else:
        counts_B = data["attention_mask"][:, -responses.shape[1] :].sum(1)
    if mask_BL.is_nested:
        mask_BL = torch.nested.to_padded_tensor(mask_BL, 0)
    number_L = torch.arange(mask_BL.shape[1], device=mask_BL.device)
    first_B = ends_B[1:] - counts_B - 1
    if not tu.get_non_tensor_data(data=data, key="use_remove_padding", default=True):
        begin_B = torch.arange(len(lengths_B), device=ends_B.device) * lengths_B.max()
        first_B = begin_B + lengths_B - counts_B - 1
    place_BL = first_B.unsqueeze(1) + number_L
    known = Known(place_BL=place_BL, response_BL=number_L < counts_B.unsqueeze(1))
    return known, mask_BL.bool()


def _field(data: Any, name: str, known: Known, mask_BL: Tensor) -> list[Any]:
    """What the agent loop returned, per response; zeros of padding sequences."""
    from verl.utils import tensordict_utils as tu

    found = tu.get(data, name)
    if found is None:
        dicts = tu.get(data, "extra_fields") or [{}] * len(mask_BL)
        found = [fields.get(name) for fields in dicts]
    counts, some = known.response_BL.sum(1).tolist(), mask_BL.any(1).tolist()
    rows: list[Any] = []
    for row, count, sampled in zip(found, counts, some, strict=True):
        if not sampled:
            row = [0.0] * count if name == ENTROPIES else [[]] * count
        if isinstance(row, dict):
            # AgentLoopOutput.as_dict() takes a dataclass apart.
            row = Support(**row)
        got = None if row is None else len(row.sizes if isinstance(row, Support) else row)
        if got != count:
            raise ValueError(
                f"AgentLoopOutput.extra_fields must have {name!r} with an entry for each of the "
                f"response's {count} tokens; got {'none' if got is None else got}"
            )
        rows.append(row)
    return rows


def _entropies(rows: list[Any], known: Known) -> Tensor:
    flat = torch.cat([torch.as_tensor(row, dtype=torch.float32).cpu() for row in rows])
    if not bool((flat.isfinite() & (flat >= 0)).all()):
        raise ValueError(f"extra_fields[{ENTROPIES!r}] must be finite and not negative")
    device = known.place_BL.device
    entropy_BL = torch.zeros(known.place_BL.shape, device=device)
    entropy_BL[known.response_BL] = flat.to(device)
    return entropy_BL


def _support(rows: list[Any], known: Known) -> Support:
    each = [row if isinstance(row, Support) else Support.of(row) for row in rows]
    return Support.concatenate([s.to("cpu") for s in each]).to(known.place_BL.device)
