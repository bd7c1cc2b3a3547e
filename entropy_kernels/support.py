"""The sets of token ids that a sampler kept: the support of each token's truncated distribution.

T tokens, D hidden, V vocabulary, N pairs of a token and an id of its set.
"""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ._arguments import check_tensor, shown
from ._shapes import Bool, Int


@dataclass(frozen=True, eq=False)
class Support:
    """The ids that top-k, top-p or min-p left to each token: a list per token, one after the other.

    The set of token t is token_ids[offsets[t] : offsets[t + 1]], in any order, without repeats. The
    token's target is in it. Tokens whose target is the head's ignore_index may have any set, such
    as an empty one. Tokens count through the leading shape of the head's target.
    """

    token_ids: Int[Tensor, " N"]
    """Ids in [0, V), int64 or int32."""
    offsets: Int[Tensor, " T1"]
    """[T + 1]: where each token's set begins, and a last number N; int64 or int32, not falling."""

    @staticmethod
    def of(sets: Iterable[Iterable[int]], device: torch.device | str | None = None) -> "Support":
        """The support whose token t has the ids `sets[t]`; vLLM's `SamplingMask.token_ids` fits.

        Raises:
            ValueError: no list of ids per token, such as lists of several sequences that are not
                joined; ids that are no whole numbers.
        """
        wanted = "sets must have a list of ids per token, all sequences' tokens in one list"
        if not isinstance(sets, Iterable):
            raise ValueError(f"{wanted}; got {shown(sets)}")
        ids: list[int] = []
        lengths = [0]
        for one in sets:
            if not isinstance(one, Iterable):
                raise ValueError(f"{wanted}; got {shown(one)} in place of a list")
            for x in one.tolist() if isinstance(one, Tensor) else one:
                if isinstance(x, bool) or not hasattr(x, "__index__"):
                    raise ValueError(f"{wanted}; got {shown(x)} in place of an id")
                ids.append(operator.index(x))
            lengths.append(len(ids))
        ids_N = torch.tensor(ids, dtype=torch.int64, device=device)
        return Support(ids_N, torch.tensor(lengths, device=device))

    @staticmethod
    def from_mask(kept: Bool[Tensor, "*tokens V"]) -> "Support":
        """The support whose tokens have the ids where `kept` is true, [T, V] or [B, L, V].

        Raises:
            ValueError: `kept` is not bool, or has no dimension of tokens.
        """
        check_tensor("kept", kept, "bool")
        if kept.ndim < 2:
            raise ValueError(f"kept must be [T, V] or [B, L, V]; got {tuple(kept.shape)}")
        kept_TV = kept.flatten(0, -2)
        zero = torch.zeros(1, dtype=torch.int64, device=kept.device)
        return Support(kept_TV.nonzero()[:, 1], torch.cat([zero, kept_TV.sum(1).cumsum(0)]))

    @staticmethod
    def concatenate(parts: "Sequence[Support]") -> "Support":
        """The sets of all `parts`, one part or more, one after the other."""
        sizes = torch.cat([part.sizes for part in parts])
        ends = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        return Support(torch.cat([part.token_ids for part in parts]), ends)

    def split(self, counts: Sequence[int]) -> "list[Support]":
        """The sets of the first counts[0] tokens, those of the next counts[1], ...: views."""
        ends = torch.tensor([0, *counts]).cumsum(0).tolist()
        pieces = [self.offsets[begin : end + 1] for begin, end in pairwise(ends)]
        return [Support(self.token_ids[piece[0] : piece[-1]], piece - piece[0]) for piece in pieces]

    @property
    def sizes(self) -> Int[Tensor, " T"]:
        """The number of ids of each token's set, int64."""
        return self.offsets.diff().long()

    def at(self, index_R: Tensor) -> "Support":
        """The sets of the tokens of these numbers, in their order."""
        sizes_R = self.sizes[index_R]
        begin_R = self.offsets[index_R].long()
        end_R = sizes_R.cumsum(0)
        zero = end_R.new_zeros(1)
        number = torch.arange(int(sizes_R.sum()), device=end_R.device)
        number += (begin_R - end_R + sizes_R).repeat_interleave(sizes_R, output_size=number.numel())
        return Support(self.token_ids[number], torch.cat([zero, end_R]))

    def to(self, device: torch.device | str) -> "Support":
        """The same on `device`."""
        return Support(self.token_ids.to(device), self.offsets.to(device))

    def check(self, tokens: int, device: torch.device) -> None:
        """Checks types, shapes and devices; `check_values` reads values.

        Raises:
            ValueError: names the field, what came and what was wanted.
        """
        for name in ("token_ids", "offsets"):
            x = getattr(self, name)
            check_tensor(f"Support.{name}", x)
            if x.dtype not in (torch.int64, torch.int32):
                raise ValueError(f"Support.{name} must be int64 or int32; got {x.dtype}")
            if x.device != device:
                raise ValueError(f"Support.{name} must be on {device}, like hidden; got {x.device}")
        if self.token_ids.ndim != 1:
            raise ValueError(f"Support.token_ids must be [N]; got {tuple(self.token_ids.shape)}")
        if self.offsets.shape != (tokens + 1,):
            raise ValueError(
                f"Support.offsets must be [{tokens + 1}], one more than the head's target has "
                f"tokens, prompt and padding included; got {tuple(self.offsets.shape)}"
            )
        if tokens == 0 and self.token_ids.numel():
            raise ValueError(
                f"Support.token_ids must be empty without tokens; got {self.token_ids.numel()}"
            )

    def check_values(self, target_T: Tensor, valid_T: Tensor, vocabulary: int) -> None:
        """Checks values: offsets that cover token_ids, ids, repeats, and each target in its set.

        Raises:
            ValueError: names the field, the token, what came and what was wanted.
        """
        ids, sizes, count = self.token_ids, self.sizes, self.token_ids.numel()
        if int(self.offsets[0]) != 0 or int(self.offsets[-1]) != count or bool((sizes < 0).any()):
            raise ValueError(
                f"Support.offsets must rise from 0 to {count}, the number of token_ids; got "
                f"{int(self.offsets[0])} to {int(self.offsets[-1])}"
                + (", falling in between" if bool((sizes < 0).any()) else "")
            )
        row = torch.arange(len(sizes), device=ids.device).repeat_interleave(sizes)
        if bool((wrong := (ids < 0) | (ids >= vocabulary)).any()):
            n = int(wrong.nonzero()[0])
            raise ValueError(
                f"Support.token_ids must lie in [0, {vocabulary}); got {int(ids[n])} in the set of "
                f"token {int(row[n])}"
            )
        key = row * vocabulary + ids
        if bool((key[1:] <= key[:-1]).any()):
            key = key.sort().values
            if bool((again := key[1:] == key[:-1]).any()):
                twice = int(key[1:][again][0])
                raise ValueError(
                    "Support.token_ids must not repeat an id in a set; got "
                    f"{twice % vocabulary} twice in the set of token {twice // vocabulary}"
                )
        found = torch.zeros_like(valid_T)
        found[row[ids == target_T[row]]] = True
        if bool((missing := valid_T & ~found).any()):
            t = int(missing.nonzero()[0])
            raise ValueError(
                f"the target of each token must be in its set; got target {int(target_T[t])} at "
                f"token {t}, whose set of {int(sizes[t])} ids is without it; a target of the "
                "head's ignore_index needs none"
            )
