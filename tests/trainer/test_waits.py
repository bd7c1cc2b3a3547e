"""What a step makes the host wait for, were its device a GPU."""

import copy
from collections import Counter

import pytest
import torch

pytest.importorskip("triton")

from tests.host_waits import HostWaits
from tests.trainer.small import build_policy
from tests.trainer.update_cases import ALONE, Recorder, configure, off_policy
from trainer.batch import micro_batches
from trainer.metrics import Stopwatch, numbers
from trainer.update import score, update


def waits_of(policy, batch, tokens):
    """Waits by the trainer's files, but for `tolist`, and the number of micro-batches."""
    policy, config = copy.deepcopy(policy), configure(tokens=tokens)
    with HostWaits("cpu") as waits:
        score(policy, batch.rollouts, config, ALONE)
        update(policy, Recorder(policy), batch, config, ALONE)
    files = Counter()
    for key, count in waits.found.items():
        files[key.split(" at ")[1].partition(":")[0]] += count
    return files, len(list(micro_batches(batch.rollouts, tokens, ALONE)))


def test_a_micro_batch_waits_for_its_lengths_alone():
    policy = build_policy()
    batch = off_policy(policy)
    (one, whole), (four, parts) = (waits_of(policy, batch, tokens) for tokens in (10**6, 40))
    assert (whole, parts) == (1, 4)
    # Once for `score`, once for `update`: that no prompt is empty.
    assert {name: four[name] - one[name] for name in ("batch.py", "update.py", "metrics.py")} == {
        "batch.py": 3 * 2,
        "update.py": 0,
        "metrics.py": 0,
    }


def test_a_gpu_is_waited_for_at_the_end_of_its_pieces(monkeypatch):
    now = iter([1000.0, 3000.0, 10_000.0, 10_500.0])
    waited = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            assert stream == "a stream"
            self.at = next(now)

        def elapsed_time(self, end):
            assert waited
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "a stream")
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    watch = Stopwatch(torch.device("cuda"))
    for _ in range(2):
        watch.start()
        watch.stop()
    assert not waited
    assert watch.seconds == 2.5


def test_metrics_of_all_parts_become_numbers_together():
    parts = [{"a": torch.tensor(3), "b": 0.5}, {"a": torch.tensor(0.25), "c": torch.tensor(True)}]
    with HostWaits("cpu") as waits:
        assert numbers(parts) == [{"a": 3.0, "b": 0.5}, {"a": 0.25, "c": 1.0}]
        assert numbers([]) == []
    assert waits.found == {}
