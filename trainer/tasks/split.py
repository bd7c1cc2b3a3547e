"""Which prompts are held out: a stable hash of the text decides, so train and test never meet."""

import hashlib


def stable_hash(text: str) -> int:
    """64 bits of BLAKE2b of `text`: the same in every process and version, unlike `hash`."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def held_out(prompt_hash: int, fraction: float) -> bool:
    """Whether the prompt of `stable_hash` is on the test side, which gets `fraction` of all."""
    return prompt_hash < fraction * 2**64


def check_index(split: str, index: int, num_test: int) -> None:
    """Refuse what no task can serve: an unknown split, or an index outside it."""
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", not {split!r}')
    if index < 0 or (split == "test" and index >= num_test):
        wanted = f"0 to {num_test - 1}" if split == "test" else "0 or more"
        raise ValueError(f"index {index} of split {split!r}: wanted {wanted}")
