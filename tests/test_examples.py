"""The examples run as they are written, on a tiny model, and do what they say."""

import ast
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
# Half of the tokens are small to begin with.
OWN_LOOP = r"step 11: reward 0\.[6-9]\d+, loss [+-]\d\.\d+, selected 205 of 1024 rows"
BY_TRL = {
    "sft_trl.py": ["--model=model", "--dataset=sft", "--steps=2"],
    "dpo_trl.py": ["--model=model", "--dataset=dpo", "--steps=2"],
    "grpo_trl.py": ["--model=model", "--steps=2"],
}
SHORT = ("*_trl.py", "own_loop.py", "grpo_lora_24gb.py", "fsdp2.py", "vllm_entropies.py")


@pytest.fixture
def folder(tmp_path):
    """A working directory with a model and data sets."""
    pytest.importorskip("transformers", reason="makes a tiny model")
    from tests.trainer.small import save_folder

    (tmp_path / "model").mkdir()
    save_folder(tmp_path / "model", "qwen3")
    rows = [(f"{i % 7} + {i % 5} =", f"{i % 7 + i % 5}", "9 9") for i in range(16)]
    data = {
        "sft": [{"prompt": p, "completion": good} for p, good, _ in rows],
        "dpo": [{"prompt": p, "chosen": good, "rejected": bad} for p, good, bad in rows],
        "sums": [{"question": p, "answer": f"#### {good}"} for p, good, _ in rows],
    }
    for name, lines in data.items():
        (tmp_path / name).mkdir()
        text = "\n".join(json.dumps(line) for line in lines)
        (tmp_path / name / "train.jsonl").write_text(text)
    return tmp_path


def run(name, *arguments, at, launcher=()):
    """The lines that an example prints."""
    command = [sys.executable, *launcher, str(EXAMPLES / name), *arguments]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(at / "cache"), "OMP_NUM_THREADS": "1"}
    environment = os.environ | offline | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=at, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_a_loop_of_ones_own(tmp_path):
    pytest.importorskip("transformers", reason="examples/own_loop.py needs it")
    assert re.fullmatch(OWN_LOOP, run("own_loop.py", at=tmp_path)[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_TRL)
def test_one_line_leaves_trls_numbers(name, folder):
    pytest.importorskip("trl", reason=f"examples/{name} needs it")
    steps = []
    for more in ([], ["--unpatched"]):
        lines = [line for line in run(name, *BY_TRL[name], *more, at=folder) if "step " in line]
        assert len(lines) == 2
        steps.append([float(x) for line in lines for x in re.findall(r" (-?\d[\d.e-]*)", line)])
    assert len(steps[0]) == 8
    assert steps[0] == pytest.approx(steps[1], rel=1e-5, abs=2e-6)
    source = (EXAMPLES / name).read_text()
    assert source.count("entropy_kernels") == 1
    assert len(re.findall(r"^ *patch_trl\(\)", source, re.M)) == 1


@pytest.mark.slow
def test_grpo_with_lora(folder):
    for package in ("trl", "peft"):
        pytest.importorskip(package, reason="examples/grpo_lora_24gb.py needs it")
    options = ["--model=model", "--dataset", "sums", "--sequences=16", "--completion=8"]
    line = run("grpo_lora_24gb.py", *options, at=folder)[-1]
    assert re.fullmatch(r"mean loss -?\d[\d.e-]*", line)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_lora_examples_header_is_the_planners():
    from trainer.plan import lora

    tree = ast.parse((EXAMPLES / "grpo_lora_24gb.py").read_text())
    header = ast.get_docstring(tree)
    planned = lora.Lora()
    table = lora.lora_table("4090", planned)
    assert textwrap.indent(table, "    ") in header
    # What the planner is asked about is what the script asks of TRL.
    source = ast.unparse(tree)
    assert f"RANK, MICRO_BATCH = ({planned.rank}, {planned.micro_batch})" in source
    for name in ("sequences", "completion"):
        assert f"'--{name}', type=int, default={getattr(planned, name)}" in source
    assert f"top_entropy_quantile={planned.fraction}" in source
    trl = pytest.importorskip("trl", reason="its default is the group's size")
    assert trl.GRPOConfig(use_cpu=True, bf16=False).num_generations == planned.group


@pytest.mark.slow
def test_fsdp2_gives_one_processes_numbers(folder):
    options = ["--model=model", "--shape", "4", "24"]
    found = []
    for count in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        lines = run("fsdp2.py", *options, at=folder, launcher=launcher)
        found.append([float(x) for line in lines for x in re.findall(r" [-+]?\d+\.\d+", line)])
        # A fifth of the 4 * 23 tokens that have a target.
        assert [line.endswith("selected 19") for line in lines] == [True] * 3
    assert len(found[0]) == 6
    assert found[0] == pytest.approx(found[1], abs=2e-4)


@pytest.mark.filterwarnings("ignore")
def test_the_notebook_shows_a_models_entropies(folder, monkeypatch, capsys):
    """Its cells in order, with a tiny model, and none of them keeps an output."""
    monkeypatch.chdir(folder)
    notebook = json.loads((EXAMPLES / "entropy_colours.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)
    settings = {"MODEL": "model", "PROMPT": "1 + 2 =", "TOKENS": 20}
    space = {"__name__": "notebook"}
    for cell in cells:
        source = "".join(cell["source"])
        exec(source, space)
        space |= {name: settings[name] for name in settings if f"{name} = " in source}
    words, entropy = space["words"], space["entropy"]
    assert 0 < len(words) == len(entropy) <= 20
    page = (folder / "entropies.html").read_text()
    assert page.count('title="') >= len(words)
    assert f"{float(entropy[0]):.3f} nats" in page
    assert "<iframe srcdoc=" in space["Shown"]()._repr_html_()
    assert f"{float(entropy.max()):6.3f}" in capsys.readouterr().out
    logits = space["model"](space["tokens"]).logits[0, space["prompt"].shape[1] - 1 : -1]
    wanted = logits.softmax(-1).xlogy(logits.softmax(-1)).sum(-1).neg()
    assert entropy.tolist() == pytest.approx(wanted.tolist(), abs=1e-5)


def test_examples_are_short():
    for pattern in SHORT:
        for path in EXAMPLES.glob(pattern):
            assert len(path.read_text().splitlines()) <= 60, path.name
