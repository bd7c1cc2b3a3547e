"""Evaluating a model: many responses a problem, kept as they come, and what they say of it."""

import re
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

import tyro

from trainer import checkpoint
from trainer.config import Config, Data, Engine, Model, Reward, Rollout
from trainer.engines import make_engine
from trainer.generations import append, open_folder
from trainer.lock import owned
from trainer.log import other_version, read_run
from trainer.policy import Policy, read_policy
from trainer.presets import QUESTION
from trainer.problems import Problem, Task
from trainer.progress import Columns, progress
from trainer.ranks import Ranks, join
from trainer.results import show, write_results
from trainer.rewards.verifier import Verifier
from trainer.rollout import sample
from trainer.tasks.benchmarks import make_benchmark
from trainer.tasks.split import stable_hash
from trainer.types import Rollouts

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
# The paper's.
TEMPLATES = {"paper": QUESTION}
MAX_NEW_TOKENS = 20_480

_COLUMNS: Columns = {
    "accuracy": (("accuracy",), ".1%"),
    "length": (("length",), ",.0f"),
    "truncated": (("truncated",), ".1%"),
}
Asked = Mapping[str, tuple[Task, list[Problem]]]
"""Each set by its short name, and those of its problems that are asked."""
# What may differ when an evaluation goes on: what is asked, and where and in what portions it runs.
_FREE = {"data", "problems", "out", "batch_size", "device", "workers"}


@dataclass(frozen=True)
class Evaluation:
    """One model on some data. The defaults are the paper's protocol."""

    model: str
    """A transformers folder or hub name, a checkpoint, or a run's folder for its last one."""
    data: tyro.conf.UseAppendAction[tuple[str, ...]]
    """aime24, aime25, amc23, math500, minerva, olympiadbench, from the hub or as NAME=PATH from a
    local copy; file:PATH, hub:NAME[:CONFIGURATION], gym:NAME or ladder. Can be repeated."""
    samples: int = 16
    """Responses a problem."""
    problems: int = 0
    """The first so many problems of each set; 0: all."""
    temperature: float = 1.0
    """Of sampling, without top-p or top-k; 0 is greedy."""
    max_new_tokens: int = 0
    """Length limit of a response; 0: the run's, or 20,480 where the model has the positions."""
    template: str = ""
    """As `data.template` of a run, or "paper", which has the instruction in it; empty: the run's,
    or "auto"."""
    instruction: str = "auto"
    """As `data.instruction` of a run; "auto": the run's, or to reason and to box the answer."""
    prompt_field: str = "prompt"
    """Of file: and hub: sources: the column of the question."""
    answer_field: str = "answer"
    """Of file: and hub: sources: the column of the answer."""
    split: str = "test"
    """Of file: and hub: sources with splits: which."""
    function: str = ""
    """As `reward.function` of a run: a verifier of your own, "module:function"."""
    seconds: float = 10.0
    """Limit of the verifier for one answer, where it runs in processes of its own."""
    workers: int = 4
    """Such processes at most, on each rank."""
    out: str = ""
    """Folder of the results; by default in `evaluations`, named after the model."""
    seed: int = 0
    """Of sampling."""
    batch_size: int = 256
    """Sequences sampled between two writes, by whole problems."""
    device: str = "auto"
    """"auto": CUDA where there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights."""
    attention: str = "sdpa"
    """transformers' attn_implementation: eager, sdpa, flash_attention_2."""
    engine: Engine = field(default_factory=Engine)

    def __post_init__(self) -> None:
        for name, low in (("samples", 1), ("batch_size", 1), ("problems", 0), ("temperature", 0)):
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} must be at least {low}; got {getattr(self, name)}")
        if not self.data or len({_short(name) for name in self.data}) < len(self.data):
            raise ValueError(f"data must name one set or more, each once; got {list(self.data)}")


Settings = TypeVar("Settings", bound=Evaluation)


def evaluate_model(settings: Evaluation) -> Path:
    """Sample and verify what is not in the folder yet, then write and print the results.

    Stopped at any moment, the same call goes on from there and ends with the same responses.
    Under torchrun the problems are spread over the ranks. Returns the path of results.json.

    Raises:
        ValueError: a model or data that cannot be read, a folder with another evaluation, or one
            that is in use.
    """
    with ExitStack() as stack:
        ranks = stack.enter_context(join(settings.device))
        settings = resolved(settings, ranks)
        stack.enter_context(owned(Path(settings.out), ranks))
        policy = load(settings, ranks)
        asked = problems_of(settings, policy)
        settings = with_limit(settings, policy, asked)
        folder, plain = Path(settings.out), asdict(settings)
        problems = {name: own for name, (_, own) in asked.items()}
        found = ranks.on_first(lambda: open_folder(folder, plain, _FREE, problems))
        _generate(folder, settings, policy, asked, found, ranks)
        if ranks.first:
            counts = {name: len(own) for name, own in problems.items()}
            show(write_results(folder, plain, counts, str(ranks.device)))
            print(f"results: {folder / 'results.json'}")
    return folder / "results.json"


def _short(name: str) -> str:
    """What a set is called in the results."""
    return name if name.startswith(("file:", "hub:")) else name.partition("=")[0]


def resolved(settings: Settings, ranks: Ranks) -> Settings:
    """With a run's own settings where the model is one, and with the defaults elsewhere."""
    path = Path(settings.model)
    model, data, limit = settings.model, Data(instruction=INSTRUCTION), 0
    if (path / "run.json").exists():
        found = checkpoint.latest(path, ranks)
        if found is None:
            raise ValueError(f"the run in {path} has no checkpoint yet")
        config = read_run(path)["config"]
        try:
            data, limit = Data(**config["data"]), config["rollout"]["max_new_tokens"]
        except (KeyError, TypeError) as error:
            raise other_version(path / "run.json", error) from error
        model = str(found)
    instruction = settings.instruction
    if instruction == "auto":
        instruction = "" if settings.template in TEMPLATES else data.instruction
    return replace(
        settings,
        model=model,
        out=settings.out or str(Path("evaluations") / re.sub(r"[^\w.-]+", "-", model).strip("-.")),
        template=TEMPLATES.get(settings.template, settings.template or data.template),
        instruction=instruction,
        max_new_tokens=settings.max_new_tokens or limit,
    )


def load(settings: Evaluation, ranks: Ranks) -> Policy:
    """A whole model on every rank; of a checkpoint too, by however many ranks it was written."""
    written = (Path(settings.model) / "manifest.json").exists()
    policy = read_policy(_model(settings), settings.seed, empty=written)
    policy.materialize(ranks.device)
    if written:
        checkpoint.load(Path(settings.model), policy, None, Ranks(ranks.device))
    return policy


def _model(settings: Evaluation) -> Model:
    return Model(path=settings.model, dtype=settings.dtype, attention=settings.attention)


def problems_of(settings: Evaluation, policy: Policy) -> Asked:
    data = Data(
        prompt_field=settings.prompt_field,
        answer_field=settings.answer_field,
        template=settings.template,
        instruction=settings.instruction,
    )
    asked = {}
    for name in settings.data:
        task = make_benchmark(name, data, settings.split, policy.tokenizer)
        count = min(settings.problems or task.num_test, task.num_test)
        asked[_short(name)] = (task, [task.problem("test", i) for i in range(count)])
    return asked


def with_limit(settings: Settings, policy: Policy, asked: Asked) -> Settings:
    """With a length limit: the paper's, or what the longest prompt leaves of the positions."""
    if settings.max_new_tokens:
        return settings
    prompts = [problem.prompt for _, problems in asked.values() for problem in problems]
    longest = max(map(len, policy.tokenizer(prompts, add_special_tokens=False).input_ids))
    positions = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None)
    left = MAX_NEW_TOKENS if positions is None else positions - longest
    if left < 1:
        raise ValueError(
            f"the longest prompt has {longest} tokens, and the model {positions} positions"
        )
    return replace(settings, max_new_tokens=min(left, MAX_NEW_TOKENS))


def _generate(
    folder: Path,
    settings: Evaluation,
    policy: Policy,
    asked: Asked,
    found: Mapping[str, int],
    ranks: Ranks,
) -> None:
    """Append what is missing to generations.jsonl, a portion of whole problems at a time."""
    size = max(settings.batch_size // settings.samples, 1)
    portions = [
        (name, first, problems[first : first + size])
        for name, (_, problems) in asked.items()
        for first in range(found.get(name, 0), len(problems), size)
    ]
    if not portions:
        return
    config = engine_config(settings)
    verifiers = {name: Verifier(task, config.reward) for name, (task, _) in asked.items()}
    for verifier in verifiers.values():
        verifier.start()  # before what takes long
    engine = make_engine(config, policy)
    engine.update_weights(policy.weights())
    total = sum(len(problems) for _, problems in asked.values())
    done = total - sum(len(portion) for *_, portion in portions)
    shown = progress("evaluation", total, done, _COLUMNS, shown=ranks.first)
    with closing(engine), shown as bar:
        for name, first, portion in portions:
            rollouts = sample(
                engine,
                policy,
                verifiers[name],
                portion,
                group_size=settings.samples,
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                seed=stable_hash(f"{settings.seed}/{name}"),
                first=first,
                ranks=ranks,
            )
            done += len(portion)
            if ranks.first:
                append(folder, name, first, rollouts)
            bar.update(done, _metrics(rollouts))
    for verifier in verifiers.values():
        verifier.close()


def engine_config(settings: Evaluation) -> Config:
    """The same as a run has it; greedy, entropies are those of temperature 1."""
    return Config(
        seed=settings.seed,
        device=settings.device,
        model=_model(settings),
        engine=settings.engine,
        rollout=Rollout(
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature or 1.0,
            batch_size=settings.batch_size,
        ),
        reward=Reward(settings.function, seconds=settings.seconds, workers=settings.workers),
    )


def _metrics(rollouts: Rollouts) -> dict[str, float]:
    return {
        "accuracy": float(rollouts.reward_B.mean()),
        "length": float(rollouts.mask_BL.sum(1).float().mean()),
        "truncated": float(rollouts.truncated_B.float().mean()),
    }
