"""What crosses a file of the loop: the rollouts of a step, a batch, the rows of a micro-batch.

The tokens of all sequences lie one after the other, without padding. B sequences, N tokens of
prompts and responses, T response tokens; R rows of W tokens are what the backbone reads.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from entropy_kernels import Support
from trainer.ranks import Ranks
from trainer.tasks.problem import Problem

# "row": all sequences in one row without padding, for attention by sequence lengths. "rows": rows
# no longer than the longest sequence, so attention reads no more than it would with one sequence
# per row. "padded": one sequence per row, for models that do not keep packed sequences apart.
Layout = Literal["row", "rows", "padded"]


@dataclass(frozen=True)
class Rollouts:
    """Sampled responses and their verdicts. The last letter of a tensor's name is its axis."""

    problems: list[Problem]  # B
    responses: list[str]  # B, without end-of-sequence
    group_B: Tensor  # int64: the number of the prompt that a sequence answers
    tokens_N: Tensor  # int64: each prompt, then its response with its end-of-sequence
    prompt_length_B: Tensor  # int64
    response_length_B: Tensor  # int64
    sampler_logprob_T: Tensor  # fp32: as the engine sampled the tokens
    sampler_entropy_T: Tensor  # fp32: of the distributions that it sampled from, nats
    truncated_B: Tensor  # bool: stopped by the length limit
    reward_B: Tensor  # fp32: the verdict, without terms
    timed_out_B: Tensor  # bool: the verifier took too long
    crashed_B: Tensor  # bool: the verifier failed
    kept: Support | None = None  # the ids that each of T tokens was sampled from; None: all

    def __len__(self) -> int:
        return len(self.problems)

    @property
    def length_B(self) -> Tensor:
        """The tokens of each prompt and response together."""
        return self.prompt_length_B + self.response_length_B

    @property
    def response_T(self) -> Tensor:
        """The token ids of the responses."""
        begin_B = self.length_B.cumsum(0) - self.response_length_B
        return self.tokens_N[_runs(begin_B, self.response_length_B, len(self.sampler_logprob_T))]

    def split(self, x_T: Tensor) -> tuple[Tensor, ...]:
        """A field of the response tokens as one tensor per sequence."""
        return x_T.split(self.response_length_B.tolist())

    def places(self, index: Tensor, count: int | None = None) -> Tensor:
        """The places in T of the response tokens of the sequences at `index`, `count` of them."""
        count = int(self.response_length_B[index].sum()) if count is None else count
        return _places(self.response_length_B, index, count)

    def rows(self, index: Tensor) -> "Rollouts":
        """The sequences at `index`, an int64 tensor, in its order.

        A GPU is waited for twice, and once more for kept sets.
        """
        length_2B = torch.stack([self.length_B, self.response_length_B])
        n, t = length_2B[:, index].sum(1).tolist()
        at = {"B": index, "N": _places(self.length_B, index, n), "T": self.places(index, t)}
        picked: dict[str, Any] = {
            name: x[at[name[-1]]] if isinstance(x, Tensor) else [x[b] for b in index.tolist()]
            for name, x in vars(self).items()
            if name != "kept"
        }
        return Rollouts(**picked, kept=self.kept and self.kept.at(at["T"]))

    def cut(self, length_B: Tensor, count: int) -> "Rollouts":
        """The same with responses of `length_B` tokens, `count` in all: the first of each.

        `responses` and verdicts stay those of the whole ones.
        """
        begin_B = self.response_length_B.cumsum(0) - self.response_length_B
        at = {"T": _runs(begin_B, length_B, count)}
        begin_B, read_B = self.length_B.cumsum(0) - self.length_B, self.prompt_length_B + length_B
        prompts = len(self.tokens_N) - len(self.sampler_logprob_T)
        at["N"] = _runs(begin_B, read_B, prompts + count)
        tensors = {n: x for n, x in vars(self).items() if n[-1] in at and isinstance(x, Tensor)}
        cut: dict[str, Any] = {name: x[at[name[-1]]] for name, x in tensors.items()}
        kept = self.kept and self.kept.at(at["T"])
        return replace(self, response_length_B=length_B, kept=kept, **cut)

    def to(self, device: torch.device) -> "Rollouts":
        """The same on `device`."""
        moved: dict[str, Any] = {
            name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor | Support)
        }
        return replace(self, **moved)

    @staticmethod
    def concatenate(parts: "Sequence[Rollouts]") -> "Rollouts":
        """The sequences of all `parts`.

        Raises:
            ValueError: some parts have kept sets and others have none.
        """
        joined: dict[str, Any] = {"kept": concatenate_kept([part.kept for part in parts])}
        for name in (field.name for field in fields(Rollouts) if field.name not in joined):
            values = [getattr(part, name) for part in parts]
            tensors = isinstance(values[0], Tensor)
            joined[name] = torch.cat(values) if tensors else [x for value in values for x in value]
        return Rollouts(**joined)


def concatenate_kept(parts: Sequence[Support | None]) -> Support | None:
    """The sets of all `parts`, one after the other; None where no part has any.

    Raises:
        ValueError: some parts have sets and others have none.
    """
    sets = [part for part in parts if part is not None]
    if not sets:
        return None
    if len(sets) < len(parts):
        raise ValueError(
            "kept sets must be those of all parts or of none: responses of a truncated sampler "
            f"cannot be joined with others; got sets of {len(sets)} of {len(parts)} parts"
        )
    return Support.concatenate(sets)


@dataclass(frozen=True)
class Batch:
    """Rollouts with all that the loss needs."""

    rollouts: Rollouts
    advantage_B: Tensor
    old_logprob_T: Tensor
    selected_T: Tensor  # by the old policy's entropies
    threshold: Tensor  # of the old policy's entropies over the whole step
    weight_T: Tensor | None = None  # factors of the tokens' losses; None: 1
    kept_length_B: Tensor | None = None  # what responses are to be cut to; None: not at all

    def rows(self, index: Tensor) -> "Batch":
        """The batch of the sequences at `index`."""
        part = self.rollouts.rows(index)
        at = self.rollouts.places(index, len(part.sampler_logprob_T))
        return Batch(
            part,
            self.advantage_B[index],
            self.old_logprob_T[at],
            self.selected_T[at],
            self.threshold,
            None if self.weight_T is None else self.weight_T[at],
            None if self.kept_length_B is None else self.kept_length_B[index],
        )

    def cut(self) -> "Batch":
        """The batch with responses of `kept_length_B` tokens; what is behind is not read."""
        length_B = self.kept_length_B
        if length_B is None:
            return self
        count = int(length_B.sum())
        whole_B = self.rollouts.response_length_B
        at = _runs(whole_B.cumsum(0) - whole_B, length_B, count)
        return replace(
            self,
            rollouts=self.rollouts.cut(length_B, count),
            old_logprob_T=self.old_logprob_T[at],
            selected_T=self.selected_T[at],
            weight_T=None if self.weight_T is None else self.weight_T[at],
            kept_length_B=None,
        )


@dataclass(frozen=True)
class Packed:
    """The rows that the backbone reads, and where the states of the response tokens are."""

    tokens_RW: Tensor  # int64; padding is 0
    positions_RW: Tensor  # int64, from 0 in each sequence; padding is 0
    mask_RW: Tensor | None  # bool: not padding; None where rows hold several sequences
    index_T: Tensor  # place in R*W of the state that predicts each response token
    target_T: Tensor  # int64: the response tokens


def pack(rollouts: Rollouts, layout: Layout) -> Packed:
    """The sequences in rows, each without its last token, which predicts nothing.

    Positions restart at 0 with each sequence; by them attention keeps the sequences of a row apart.
    """
    # The state before a response would be another sequence's; `prompt_ids` refuses such prompts.
    assert (rollouts.prompt_length_B > 0).all(), "a prompt without a token"
    length_B, response_B = rollouts.length_B, rollouts.response_length_B
    read_B, begin_B = length_B - 1, length_B.cumsum(0) - length_B
    read_N = _runs(begin_B, read_B, len(rollouts.tokens_N) - len(rollouts))
    packed = arrange(rollouts.tokens_N[read_N], read_B, layout)
    number_T = _runs(read_B.cumsum(0) - response_B, response_B, len(rollouts.sampler_logprob_T))
    return replace(packed, index_T=packed.index_T[number_T], target_T=rollouts.response_T)


def arrange(tokens_N: Tensor, length_B: Tensor, layout: Layout) -> Packed:
    """Sequences of `length_B` tokens, given one after the other, in rows.

    index_T and target_T are those of every token itself. No sequence gives one token of padding: a
    rank without work has to run its backbone too.
    """
    device = tokens_N.device
    length_B = length_B.to(device)
    begins, (rows, width) = _fit(length_B.tolist(), layout)
    begin_B = torch.tensor(begins, dtype=torch.long).to(device, non_blocking=True)
    place_N = _runs(begin_B, length_B, len(tokens_N))
    tokens = torch.zeros(rows * width, dtype=torch.long, device=device)
    positions, mask = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
    tokens[place_N] = tokens_N
    positions[place_N] = _runs(torch.zeros_like(begin_B), length_B, len(tokens_N))
    mask.index_fill_(0, place_N, True)
    return Packed(
        tokens.view(rows, width),
        positions.view(rows, width),
        mask.view(rows, width) if layout == "padded" else None,
        place_N,
        tokens_N,
    )


def micro_batches(rollouts: Rollouts, tokens: int, ranks: Ranks) -> Iterator[Tensor]:
    """The numbers of this rank's sequences in each micro-batch of at most `tokens` tokens."""
    device = rollouts.tokens_N.device
    for parts in partition((rollouts.length_B - 1).tolist(), ranks.size, tokens):
        yield torch.tensor(parts[ranks.rank], dtype=torch.long).to(device, non_blocking=True)


def partition(lengths: Sequence[int], ranks: int, budget: int) -> list[list[list[int]]]:
    """The numbers of the sequences of each rank in each micro-batch: [micro-batch][rank].

    Every rank has the same number of micro-batches, some perhaps empty. Each holds at most `budget`
    tokens, or one longer sequence. Their number is the least that fits when the longest sequence
    left always goes where the fewest tokens are. The parts of one micro-batch are about as long.
    The result depends on the arguments alone.
    """
    longest_first = sorted(range(len(lengths)), key=lambda b: (-lengths[b], b))
    most = max(budget, *lengths, 1)
    count = max(1, -(-sum(lengths) // (ranks * most)))
    while True:
        parts = _spread(longest_first, lengths, ranks * count)
        if sum(lengths[b] for b in parts[0]) <= most:
            break
        count += 1
    return [parts[start : start + ranks] for start in range(0, len(parts), ranks)]


def _spread(order: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    """`count` parts, those of the most tokens first, each in the order of the numbers."""
    parts: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, part) for part in range(count)]
    for b in order:
        tokens, part = heapq.heappop(heap)
        parts[part].append(b)
        heapq.heappush(heap, (tokens + lengths[b], part))
    full = sorted(heap, key=lambda entry: (-entry[0], entry[1]))
    return [sorted(parts[part]) for _, part in full]


def _places(length_B: Tensor, index: Tensor, count: int) -> Tensor:
    """The places of the `count` tokens of the sequences at `index` among the tokens of all."""
    begin_B = length_B.cumsum(0) - length_B
    return _runs(begin_B[index], length_B[index], count)


def _runs(begin_B: Tensor, count_B: Tensor, count: int) -> Tensor:
    """begin, begin + 1, ... of each sequence, `count_B` numbers each, one after the other.

    `count` is how many they are in all: without it a GPU would be waited for.
    """
    before_B = count_B.cumsum(0) - count_B
    number = torch.arange(count, device=begin_B.device)
    return number + (begin_B - before_B).repeat_interleave(count_B, output_size=count)


def _fit(lengths: Sequence[int], layout: Layout) -> tuple[list[int], tuple[int, int]]:
    """Where each sequence begins in R*W, and (R, W)."""
    if layout == "row":
        ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
        return ends[:-1], (1, max(ends[-1], 1))
    width = max(lengths, default=1)
    if layout == "padded":
        return [row * width for row in range(len(lengths))], (max(len(lengths), 1), width)
    # First fit, longest first.
    filled: list[int] = []
    begins = [0] * len(lengths)
    for b in sorted(range(len(lengths)), key=lambda b: (-lengths[b], b)):
        fits = (r for r, used in enumerate(filled) if used + lengths[b] <= width)
        row = next(fits, len(filled))
        if row == len(filled):
            filled.append(0)
        begins[b] = row * width + filled[row]
        filled[row] += lengths[b]
    return begins, (max(len(filled), 1), width)
