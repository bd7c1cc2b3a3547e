"""What the fault run compares; the run itself takes minutes and is no test."""

import json
import shutil

import pytest
import torch

from benchmarks.fault_run import compare
from tests.trainer.small import build_policy
from trainer import checkpoint
from trainer.checkpoint import Progress
from trainer.ranks import Ranks


def write(run, *, seed=0, steps=1, next_problem=7, loss=0.5, sample="a"):
    policy = build_policy("qwen3", seed=seed)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=0.0)
    for _ in range(steps):
        policy.model(torch.arange(6)[None]).logits.square().mean().backward()
        optimizer.step()
    ranks = Ranks(torch.device("cpu"))
    checkpoint.save(run, policy, optimizer, Progress(2, next_problem), 2, ranks)
    row = {"step": 1, "loss": loss, "time/step": seed, "tokens_per_second": loss}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (run / "samples.jsonl").write_text(sample)


@pytest.mark.parametrize(
    ("changes", "different"),
    [
        ({}, set()),
        ({"loss": 0.25}, {"metrics"}),
        ({"sample": "b"}, {"samples"}),
        ({"next_problem": 8}, {"progress"}),
        ({"steps": 2}, {"optimizer"}),
        ({"seed": 1}, {"weights", "optimizer"}),
    ],
    ids=["nothing", "metrics", "samples", "progress", "optimizer", "weights"],
)
def test_each_difference_is_found(tmp_path, changes, different):
    write(tmp_path / "whole")
    write(tmp_path / "killed", **changes)
    equal = compare(tmp_path / "killed", tmp_path / "whole")
    assert {name for name, same in equal.items() if not same} == different
    assert equal.keys() == {"metrics", "samples", "progress", "weights", "optimizer"}
    shutil.rmtree(tmp_path / "killed" / "checkpoints")
    with pytest.raises(SystemExit, match="has no checkpoint"):
        compare(tmp_path / "killed", tmp_path / "whole")
