"""What the tests of the analyses share: two models in a folder, and ten questions."""

import json
from pathlib import Path

import pytest

from tests.trainer.small import save_folder


@pytest.fixture(autouse=True)
def here(own_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[str, str]:
    """Random weights that end a response now and then; the second's are others."""
    folders = [tmp_path_factory.mktemp(name) / name for name in ("base", "last")]
    return tuple(save_folder(folder, spread=0.4, seed=seed) for seed, folder in enumerate(folders))


@pytest.fixture(scope="module")
def sums(tmp_path_factory) -> str:
    """Ten questions whose answer is 7."""
    rows = [{"prompt": f"{i} + {7 - i} =", "answer": "7"} for i in range(10)]
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"file:{path}"


def options(data: str, out: Path) -> dict:
    """The options of every analysis here."""
    return {
        "data": (data,),
        "samples": 4,
        "max_new_tokens": 8,
        "batch_size": 12,
        "instruction": "",
        "out": str(out),
        "device": "cpu",
    }
