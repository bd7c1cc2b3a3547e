"""The pins of constraints.txt fit each other; the ordinary index shows it where it is reached."""

import re
from pathlib import Path

import pytest

from tests import resolution

ROOT = Path(__file__).parents[1]
# The Triton that torch's ordinary wheels for Linux require, read off their metadata.
TRITON_OF_TORCH = {
    "2.8.0": "3.4.0",
    "2.9.1": "3.5.1",
    "2.10.0": "3.6.0",
    "2.11.0": "3.6.0",
    "2.12.0": "3.7.0",
    "2.13.0": "3.7.1",
    "2.14.0": "3.8.0",
    "2.14.1": "3.8.0",
    "2.15.0": "3.9.0",
}


def pins() -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==([^;\s]+)", (ROOT / "constraints.txt").read_text(), re.M))


def test_triton_is_pinned_to_what_torch_requires():
    assert pins()["triton"] == TRITON_OF_TORCH[pins()["torch"]]


@pytest.fixture
def index():
    why = resolution.reached()
    if why is not None:
        pytest.skip(f"the ordinary index is not reached: {why}")


@pytest.mark.slow
def test_a_pin_that_torch_does_not_allow_is_a_conflict(index, tmp_path, capsys):
    wrong = tmp_path / "constraints.txt"
    wrong.write_text(f"torch=={pins()['torch']}\ntriton==3.9.0\n")
    (why,) = resolution.failures((resolution.Wish("3.12", pins=str(wrong), extras=()),))
    assert "triton" in why
    assert "CONFLICT" in capsys.readouterr().out


@pytest.mark.slow
def test_an_index_that_is_not_reached_is_no_conflict(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("HOME", "/nowhere")
    monkeypatch.setenv("XDG_CACHE_HOME", "/nowhere")
    assert resolution.reached() is not None
