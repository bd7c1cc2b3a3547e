"""The scripts of examples/ run as they are, and do what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def learns_on_a_fifth_of_the_tokens(printed):
    line = r"step \d+: reward (\d\.\d+), loss [+-]\d\.\d+, kept 205 of 1024 rows"
    rewards = [float(reward) for reward in re.findall(line, printed)]
    assert len(rewards) == len(printed.splitlines()) == 12
    assert rewards[-1] > rewards[0] + 0.1


EXAMPLES = {"own_loop.py": learns_on_a_fifth_of_the_tokens}


@pytest.mark.parametrize("script", EXAMPLES)
def test_example(script):
    pytest.importorskip("transformers")
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "examples" / script)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    EXAMPLES[script](done.stdout)
