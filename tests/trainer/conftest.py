"""What all tests of the trainer share: one thread, the task as it was, a model, a cache."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import trainer.run
from tests.trainer.small import save_folder, settings
from trainer.config import Config
from trainer.train import train


def _one_thread() -> Iterator[None]:
    """One thread; afterwards the threads and the runs' task are as they were."""
    before, task = torch.get_num_threads(), trainer.run.make_task
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    trainer.run.make_task = task


_of_a_module = pytest.fixture(_one_thread, scope="module", autouse=True)
_of_a_test = pytest.fixture(_one_thread, autouse=True)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's own cache of `datasets`."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a small model."""
    return save_folder(tmp_path_factory.mktemp("model"), spread=0.2)


@pytest.fixture(scope="module")
def whole(model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    """The folder of an uninterrupted run of six steps, and its settings."""
    config = settings(tmp_path_factory.mktemp("whole"), model)
    train(config)
    return config.folder, config
