"""The examples run as they are written, and do what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Script: packages it needs besides the trainer's, arguments, and what its last line looks like.
EXAMPLES = {
    # Half of the tokens are small to begin with.
    "own_loop.py": (
        ["transformers"],
        [],
        r"step 11: reward 0\.[6-9]\d+, loss [+-]\d\.\d+, selected 205 of 1024 rows",
    ),
    "grpo_trl.py": (
        ["trl"],
        ["--steps=2"],
        r"step 2 loss -?0\.\d+ entropy [12]\.\d+ reward 0\.\d+",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name, tmp_path):
    needs, arguments, last = EXAMPLES[name]
    for package in needs:
        pytest.importorskip(package, reason=f"examples/{name} needs it")
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(last, done.stdout.splitlines()[-1]), done.stdout
