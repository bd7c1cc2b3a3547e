"""TRL's SFT, DPO, KTO and RLOO trainers on TRL's head and on ours: losses, rows, time and memory.

python -m benchmarks.trl_trainers [--vocabulary 151936] [--steps 20] [--rounds 2]

Each trainer runs its steps with TRL's head and with `patch_trl()`, from the same weights on the
same data, in turns and in one process. The backbone is small, so that most of a step is the head.
A trainer that the result file has with the same settings is not run again. The file is
benchmarks/results/trl_trainers.json; `python -m benchmarks.report` puts its table into
docs/benchmarks.md.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.sources import commit, versions
from benchmarks.tables import table
from entropy_kernels._bench.machine import processor
from entropy_kernels._bench.result_text import result_text
from entropy_kernels._bench.rounds import peak_of

RESULT = Path(__file__).parent / "results" / "trl_trainers.json"
KINDS = ("sft", "dpo", "kto", "rloo")
SIZES = {"vocabulary": 151_936, "hidden": 256, "length": 64, "batch": 4, "steps": 20, "rounds": 2}
MEASURED = ("benchmarks/trl_trainers.py", "entropy_kernels", "csrc")
# With such initial weights, entropies lie between about 1 nat and half of log V.
SPREAD = 5.0
# fp32's rounding of sums that are 0.
NOTHING = 1e-5
TITLE = (
    "**TRL's trainers on TRL's head and on ours**, in fp32. Losses and norms of the gradient "
    "differ by at most so much of the largest of the run. RLOO's loss is 0 but for rounding where "
    "all responses have one length, so its column is empty. Rows are those of the head in one "
    "step, with the reference's: on a CPU TRL's head runs on prompts and padding too. Seconds are "
    "medians over the steps of all rounds; RLOO's include sampling. MB is the peak of resident "
    "memory over a training, above what was there before it."
)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = vars(parser.parse_args(arguments))
    out = options.pop("out")
    found = json.loads(out.read_text()) if out.exists() else {}
    if found.get("settings") != options or found.get("commit") != commit(*MEASURED):
        found = about() | {"settings": options, "trainers": {}}
    for kind in KINDS:
        if kind not in found["trainers"]:
            found["trainers"][kind] = measure(kind, options)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(result_text(found))
    print(f"{tables(found)}\n\n{out}")
    return 0


def about() -> dict[str, Any]:
    """Machine, versions, commit and date."""
    return {
        "machine": str(processor()),
        "threads": torch.get_num_threads(),
        "versions": versions(["torch", "transformers", "trl"]),
        "commit": commit(*MEASURED),
        "date": date.today().isoformat(),
    }


def measure(kind: str, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Losses, rows, seconds and bytes of one trainer, by head."""
    from entropy_kernels.integrations.trl import patch_trl

    ways: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "theirs": nullcontext,
        "ours": patch_trl,
    }
    found: dict[str, dict[str, Any]] = {name: {"seconds": [], "bytes": []} for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder, sizes)
        # Once for libraries and threads, before anything is timed.
        for patch in ways.values():
            with patch():
                training(kind, folder, {**sizes, "steps": 1})
        for _ in range(sizes["rounds"]):
            for name, patch in ways.items():
                with patch():
                    run, peak = peak_of(lambda: training(kind, folder, sizes), torch.device("cpu"))
                seconds = found[name]["seconds"] + run.pop("seconds")
                found[name] |= run | {"seconds": seconds, "bytes": found[name]["bytes"] + [peak]}
    return found


def training(kind: str, folder: str, sizes: Mapping[str, int]) -> dict[str, Any]:
    """The losses, norms of the gradient, seconds and head's rows of each step."""
    import trl
    from datasets import Dataset
    from trl.trainer import utils

    from entropy_kernels.integrations._patch import Patch

    own = {"num_generations": sizes["batch"], "max_completion_length": sizes["length"]}
    trainer = getattr(trl, f"{kind.upper()}Trainer")(
        model=folder,
        args=getattr(trl, f"{kind.upper()}Config")(
            output_dir=f"{folder}/run",
            max_steps=sizes["steps"],
            per_device_train_batch_size=sizes["batch"],
            learning_rate=1e-3,
            optim="sgd",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            **({"beta": 0.1} | own if kind == "rloo" else {"max_length": None}),
        ),
        train_dataset=Dataset.from_list(rows(kind, sizes)),
        **({"reward_funcs": _distinct} if kind == "rloo" else {}),
    )
    trainer.remove_callback(_printer())
    forward: list[int] = []
    backward: list[int] = []
    seconds: list[float] = []
    step = trainer.training_step

    def timed(*arguments: Any, **options: Any) -> Any:
        forward.append(0)
        backward.append(0)
        began = time.perf_counter()
        try:
            return step(*arguments, **options)
        finally:
            seconds.append(time.perf_counter() - began)

    trainer.training_step = timed
    function = _Watched(utils._ChunkedLogProbFunction, forward, backward)
    with Patch((utils, "_ChunkedLogProbFunction", function)):
        trainer.train()
    steps = [row for row in trainer.state.log_history if "loss" in row]
    found = {"losses": "loss", "norms": "grad_norm"}
    logged = {name: [row[key] for row in steps] for name, key in found.items()}
    return logged | {"forward": forward, "backward": backward, "seconds": seconds}


class _Watched:
    """A head's function, and in the last entries of two lists the rows that it computes."""

    def __init__(self, function: Any, forward: list[int], backward: list[int]) -> None:
        self._function, self._forward, self._backward = function, forward, backward
        self._dense = isinstance(function, type)

    def apply(self, hidden: torch.Tensor, *rest: Any) -> Any:
        found = self._function.apply(hidden, *rest)
        self._forward[-1] += len(hidden)
        if found[0].requires_grad:
            found[0].register_hook(self._count)
        return found

    def _count(self, grad: torch.Tensor) -> None:
        self._backward[-1] += len(grad) if self._dense else int((grad != 0).sum())


def _distinct(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [len(set(ids)) / 10 for ids in completion_ids]


def _printer() -> Any:
    from transformers import PrinterCallback

    return PrinterCallback


def rows(kind: str, sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    """Prompts and answers of random words, of a half of `length` to all of it."""
    generator = random.Random(0)

    def words(most: int) -> str:
        count = generator.randint(most // 2, most)
        return " ".join(str(generator.randrange(sizes["vocabulary"] - 3)) for _ in range(count))

    found = []
    for i in range(sizes["batch"] * sizes["steps"]):
        good, bad = words(sizes["length"]), words(sizes["length"])
        answers: dict[str, dict[str, Any]] = {
            "sft": {"completion": good},
            "dpo": {"chosen": good, "rejected": bad},
            "kto": {"completion": good, "label": bool(i % 2)},
            "rloo": {},
        }
        found.append({"prompt": words(sizes["length"] // 4)} | answers[kind])
    return found


def write_model(folder: str, sizes: Mapping[str, int]) -> None:
    """A Qwen3 of 2 layers with random weights, and a tokenizer of numbers as words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    special = ["<pad>", "<eos>", "<unk>"]
    vocabulary = special + [str(i) for i in range(sizes["vocabulary"] - len(special))]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **tokens).save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=sizes["vocabulary"],
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["hidden"],
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=SPREAD / sizes["hidden"] ** 0.5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


def of(results: Path) -> list[str]:
    """What docs/benchmarks.md shows, if there is a result in the folder."""
    path = results / RESULT.name
    return [tables(json.loads(path.read_text()))] if path.exists() else []


def tables(result: Mapping[str, Any]) -> str:
    """The table of a result."""
    columns = ["trainer", "losses differ by", "norms", "rows in forward, TRL", "ours"]
    columns += ["rows in backward, TRL", "ours"]
    columns += ["s per step, TRL", "ours", "MB, TRL", "ours"]
    lines = []
    for kind, found in result["trainers"].items():
        theirs, ours = found["theirs"], found["ours"]
        cells = [differences(ours[name], theirs[name]) for name in ("losses", "norms")]
        for name in ("forward", "backward"):
            cells += [f"{median(way[name]):,.0f}" for way in (theirs, ours)]
        cells += [f"{median(way['seconds']):.2f}" for way in (theirs, ours)]
        cells += [f"{median(way['bytes']) / 1e6:,.0f}" for way in (theirs, ours)]
        lines.append([kind.upper(), *cells])
    sizes, named = result["settings"], result["versions"]
    small = ", ".join(f"{name} {number}" for name, number in named.items())
    about = (
        f"<sub>V = {sizes['vocabulary']:,}, D = {sizes['hidden']}, {sizes['steps']} steps in each "
        f"of {sizes['rounds']} rounds; {result['machine']}, {result['threads']} threads; {small}; "
        f"commit {result['commit']}; {result['date']}.</sub><br>"
    )
    return "\n\n".join([TITLE, table(columns, lines), about])


def differences(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The largest difference, or nothing where all numbers are 0 but for rounding."""
    if max(map(abs, theirs)) < NOTHING:
        return ""
    return f"{difference(ours, theirs):.1e}"


def difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest difference in a step, relative to the largest number of the run."""
    pairs = zip(ours, theirs, strict=True)
    return max(abs(a - b) for a, b in pairs) / max(abs(x) for x in theirs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
