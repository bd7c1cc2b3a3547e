"""Evaluating a model: many responses per problem, kept as they come, and what they say."""

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Generic, Literal, TypeVar

from trainer import checkpoint
from trainer.batch import Rollouts
from trainer.checkpoint.source_run import SourceRun, source_run
from trainer.config import Config, Data, Eval, Model, Reward, Rollout
from trainer.engines import make_engine
from trainer.engines.engine import Engine as Sampler
from trainer.evaluation.answers import answers
from trainer.evaluation.generations import append, open_folder, rows
from trainer.evaluation.results import Tally, show, write_results
from trainer.evaluation.sets import HELD_OUT, EvaluationSet, make_set, warn_of_repeats
from trainer.evaluation.settings import (
    SAMPLES,
    Evaluation,
    given,
    samples_of,
    temperature_of,
    truncation_of,
)
from trainer.launch.lock import owned
from trainer.launch.needs import check_needs
from trainer.model.tokens import prompt_ids
from trainer.policy import Policy, read_policy
from trainer.presets import QUESTION
from trainer.ranks import Ranks, join
from trainer.report.progress import Columns, progress
from trainer.tasks import make_task
from trainer.tasks.benchmarks import check_sets, has_own_columns, make_benchmark, short_name
from trainer.tasks.lengths import check_prompts
from trainer.tasks.problem import Task

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
# The paper's limit.
TEMPLATES = {"paper": QUESTION}
MAX_NEW_TOKENS = 20_480

_COLUMNS: Columns = {
    "accuracy": (("accuracy",), ".1%"),
    "95% from": (("low",), ".1%"),
    "to": (("high",), ".1%"),
    "reward": (("reward",), ".3g"),
    "length": (("length",), ",.0f"),
    "truncated": (("truncated",), ".1%"),
}
Sets = Mapping[str, EvaluationSet]
"""The sets by their short names."""
# Settings that may differ when an evaluation goes on: its sets, and where and how it runs.
_FREE = {"data", "problems", "out", "batch_size", "device", "workers", "right"}


Settings = TypeVar("Settings", bound=Evaluation)


@dataclass(frozen=True)
class Opened(Generic[Settings]):
    """An evaluation, or an analysis, that has begun."""

    settings: Settings
    """The settings, with defaults resolved."""
    policy: Policy
    sets: Sets
    ranks: Ranks

    @property
    def folder(self) -> Path:
        """The folder of its results."""
        return Path(self.settings.out)

    def answers(self, engine: Sampler, one: EvaluationSet, first: int = 0) -> Iterator[Rollouts]:
        """The responses of `engine` to the problems of `one`: see `answers`."""
        settings = self.settings
        return answers(
            one,
            engine,
            self.policy,
            self.ranks,
            samples=samples_of(settings),
            max_new_tokens=settings.max_new_tokens,
            temperature=temperature_of(settings),
            truncation=truncation_of(settings),
            at_once=settings.batch_size,
            seed=settings.seed,
            first=first,
        )


@contextmanager
def opened(settings: Settings) -> Iterator[Opened[Settings]]:
    """The model and problems of `settings`, and a folder for the results that nobody else uses.

    Raises ValueError for a model or data that cannot be read, and a folder that is in use.
    """
    with ExitStack() as stack:
        ranks = stack.enter_context(join(settings.device))
        asked, settings = settings, resolved(settings, ranks)
        check_needs(as_run(settings))
        stack.enter_context(owned(Path(settings.out), ranks))
        policy = load(settings, ranks)
        sets = sets_of(settings, asked, policy)
        for one in sets.values():
            stack.callback(one.verifier.close)
        yield Opened(with_limit(settings, policy, sets), policy, sets, ranks)


def evaluate_model(settings: Evaluation) -> Path:
    """Sample and verify the responses that the folder lacks, then write and print the results.

    Stopped at any moment, the same call goes on from there and ends with the same responses.
    Under torchrun the problems are spread over the ranks. Returns the path of results.json.

    Raises:
        ValueError: a model or data that cannot be read, a folder with another evaluation, or one
            that is in use.
    """
    with opened(settings) as work:
        folder, ranks, plain = work.folder, work.ranks, asdict(work.settings)
        if ranks.first:
            warn_of_repeats(work.sets.values())
        problems = {name: one.problems for name, one in work.sets.items()}
        found = ranks.on_first(lambda: open_folder(folder, plain, _FREE, problems))
        _generate(work, found)
        if ranks.first:
            show(write_results(folder, plain, work.sets, str(ranks.device)))
            print(f"results: {folder / 'results.json'}")
    return folder / "results.json"


def resolved(settings: Settings, ranks: Ranks) -> Settings:
    """`settings` without gaps, filled from the model's run, if it has one, or by defaults.

    Raises ValueError for data that cannot be there, a run without a checkpoint, and a model that is
    no run's without data.
    """
    check_sets([name for name in settings.data if name != HELD_OUT])
    run, model = source_run(settings.model), settings.model
    if run is None and HELD_OUT in (settings.data or (HELD_OUT,)):
        raise ValueError(
            f"data must name one set or more: {model} is neither a run nor a checkpoint of one, "
            f"which would have held-out problems of its own; got {list(settings.data)}"
        )
    if run is not None and Path(model) == run.folder:
        model = str(checkpoint.find(run.folder, None, ranks))
    plain = Data(instruction=INSTRUCTION)
    own = run or SourceRun(Path(model), settings.seed, plain, model=Model(attention="sdpa"))
    longest = settings.engine.max_model_len or own.engine.max_model_len
    reward, instruction = own.reward, settings.instruction
    if instruction == "auto":
        instruction = "" if settings.template in TEMPLATES else own.data.instruction
    limit = own.eval.max_new_tokens or own.rollout.max_new_tokens if run else 0
    return replace(
        settings,
        model=model,
        data=settings.data or (HELD_OUT,),
        out=settings.out or str(Path("evaluations") / re.sub(r"[^\w.-]+", "-", model).strip("-.")),
        samples=given(settings.samples, SAMPLES if settings.data else own.eval.samples),
        temperature=given(settings.temperature, own.eval.temperature),
        top_k=given(settings.top_k, own.eval.top_k),
        top_p=given(settings.top_p, own.eval.top_p),
        min_p=given(settings.min_p, own.eval.min_p),
        max_new_tokens=settings.max_new_tokens or limit,
        template=TEMPLATES.get(settings.template, settings.template or own.data.template),
        instruction=instruction,
        prompt_field=settings.prompt_field or own.data.prompt_field,
        answer_field=settings.answer_field or own.data.answer_field,
        function=given(settings.function, reward.function),
        right=given(settings.right, reward.right if settings.function is None else 1.0),
        seconds=given(settings.seconds, reward.seconds),
        gigabytes=given(settings.gigabytes, reward.gigabytes),
        dtype=own.sampled_in if settings.dtype == "auto" else settings.dtype,
        attention=own.model.attention if settings.attention == "auto" else settings.attention,
        engine=replace(settings.engine, max_model_len=longest),
    )


def load(settings: Evaluation, ranks: Ranks) -> Policy:
    """The whole model on every rank, also from a checkpoint of any number of ranks."""
    written = (Path(settings.model) / "manifest.json").exists()
    longest = settings.engine.max_model_len
    policy = read_policy(_model(settings), settings.seed, empty=written, longest=longest)
    policy.chat = settings.template == "auto"
    policy.materialize(ranks.device)
    if written:
        checkpoint.load(Path(settings.model), policy, None, Ranks(ranks.device))
    return policy


def _model(settings: Evaluation) -> Model:
    dtype: Literal["float32", "bfloat16"] = (
        "float32" if settings.dtype == "auto" else settings.dtype
    )
    return Model(path=settings.model, dtype=dtype, attention=settings.attention)


def sets_of(settings: Evaluation, asked: Evaluation, policy: Policy) -> Sets:
    """The sets of `settings`, which are `asked` with all gaps filled, by their names.

    Sets with an answer format of their own are judged by their own verifiers unless `asked` names
    one. Raises ValueError for data that cannot be read.
    """
    run, reward = source_run(settings.model), _reward(settings)
    data = replace(
        run.data if run else Data(),
        prompt_field=settings.prompt_field,
        answer_field=settings.answer_field,
        template=settings.template,
        instruction=settings.instruction,
    )
    own = _from(replace(reward, function=asked.function or ""), given(asked.right, 1.0))
    found = {}
    for name in settings.data:
        judged = own if has_own_columns(name) and name != HELD_OUT else reward
        if name == HELD_OUT and run:
            task = make_task(data, run.seed, policy.tokenizer)
            _check_held_out(run, task)
            check_prompts(task, policy.tokenizer, None, data.max_prompt_tokens)
            count = settings.problems or run.eval.problems
        else:
            task = make_benchmark(name, data, settings.split, policy.tokenizer)
            count = settings.problems or task.num_test
        found[short_name(name)] = make_set(short_name(name), task, count, judged)
    return found


def _check_held_out(run: SourceRun, task: Task) -> None:
    """Warn if the data have changed since the run was trained."""
    now = getattr(task, "digest", "")
    if run.digest and now and now != run.digest:
        print(
            f"warning: {task.name} has other contents than when {run.folder} started last: other "
            "problems may be held out, and some of them trained on",
            file=sys.stderr,
        )


def _reward(settings: Evaluation) -> Reward:
    """The reward of the model's run, if it has one, with the changes of `settings`."""
    run = source_run(settings.model)
    return replace(
        _from(run.reward if run else Reward(), given(settings.right, 1.0)),
        function=settings.function or "",
        seconds=given(settings.seconds, 10.0),
        gigabytes=given(settings.gigabytes, 4.0),
        workers=settings.workers,
    )


def _from(reward: Reward, right: float) -> Reward:
    """`reward` with verdicts of at least `right` being right, and failures not."""
    kept = reward.failed is not None and reward.failed < right
    return replace(reward, right=right, failed=reward.failed if kept else None)


def with_limit(settings: Settings, policy: Policy, sets: Sets) -> Settings:
    """`settings` with a length limit: the paper's, or the room that the longest prompt leaves."""
    if settings.max_new_tokens:
        return settings
    posed = [problem for one in sets.values() for problem in one.problems]
    longest = max(map(len, prompt_ids(policy.tokenizer, posed)))
    positions = policy.longest
    left = MAX_NEW_TOKENS if positions is None else positions - longest
    if left < 1:
        raise ValueError(
            f"the longest prompt has {longest} tokens, and the model {positions} positions"
        )
    return replace(settings, max_new_tokens=min(left, MAX_NEW_TOKENS))


def _generate(work: Opened, found: Mapping[str, int]) -> None:
    """Append the missing responses to generations.jsonl, some problems at a time."""
    missing = [one for one in work.sets.values() if found.get(one.name, 0) < len(one.problems)]
    if not missing:
        return
    for one in missing:
        one.verifier.start()  # early, as its processes take a while
    engine = make_engine(engine_config(work.settings), work.policy)
    engine.update_weights(work.policy.weights())
    with closing(engine):
        for one in missing:
            _answer(work, engine, one, found.get(one.name, 0))


def _answer(work: Opened, engine: Sampler, one: EvaluationSet, begin: int) -> None:
    """Answer the problems of `one` from number `begin` on; the bar shows all that are answered."""
    first, done, answered = work.ranks.first, begin, Tally(one.reward)
    if first and begin:
        for row in rows(work.folder, {one.name: begin}):
            answered.add(row)
    total = len(one.problems)
    with progress(f"{one.name}: problems", total, begin, _COLUMNS, shown=first) as bar:
        for rollouts in work.answers(engine, one, begin):
            if first:
                for row in append(work.folder, one.name, done, rollouts):
                    answered.add(row)
            done += len(rollouts) // samples_of(work.settings)
            bar.update(done, answered.metrics() if first else {})


def as_run(settings: Evaluation) -> Config:
    """The configuration of a run with the same needs."""
    return Config(
        device=settings.device,
        model=_model(settings),
        engine=settings.engine,
        eval=Eval(data=tuple(name for name in settings.data if name != HELD_OUT)),
    )


def engine_config(settings: Evaluation) -> Config:
    """The configuration of a run that samples alike; if greedy, entropies are at temperature 1."""
    return Config(
        seed=settings.seed,
        device=settings.device,
        model=_model(settings),
        engine=settings.engine,
        rollout=Rollout(
            max_new_tokens=settings.max_new_tokens,
            temperature=temperature_of(settings) or 1.0,
            **asdict(truncation_of(settings)),
            batch_size=settings.batch_size,
        ),
        reward=_reward(settings),
    )
