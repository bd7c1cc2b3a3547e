"""The warm start: supervised training on a task's demonstrations, kept for later runs.

N tokens of a batch that the backbone reads, T its response tokens, D hidden; R rows of W tokens.
"""

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

import entropy_kernels as ek
from entropy_kernels.integrations.hf import LMHead, lm_head
from trainer.batch import arrange
from trainer.config import WarmStart
from trainer.errors import naming
from trainer.finite import first_nonfinite
from trainer.model.folder import save_model
from trainer.model.tokens import prompt_ids, response_ids
from trainer.tasks.problem import Problem, Task

BETAS = (0.9, 0.95)
GRAD_CLIP = 1.0
FINAL_RATE = 0.1  # where the cosine ends, of the peak

_RECIPE = 2  # Part of the name of what is kept: count up when the training below changes.
_PROBED_DEMONSTRATIONS = 64

Report = Callable[[int, Mapping[str, float]], None]
"""A function that is called after every step with its number, "loss" and "tokens_per_second"."""


@runtime_checkable
class Demonstrator(Protocol):
    """A task that can show how its problems are solved."""

    def demonstrations(self, count: int, seed: int) -> list[tuple[Problem, str]]:
        """`count` training problems with a response each, fewer where there are no more.

        A smaller `count` gives the first ones.
        """
        ...


class Example(NamedTuple):
    """A demonstration in tokens: `start` of them are the prompt's, the last is end-of-sequence."""

    tokens: Tensor
    start: int


def load_or_warm_start(
    model: Any,
    tokenizer: Any,
    task: Task,
    settings: WarmStart,
    seed: int,
    report: Report | None = None,
    impl: str = "auto",
) -> Path:
    """Warm-start `model` in place, or load what an earlier run with the same inputs has kept.

    Returns its transformers folder, `settings.cache` / a hash of the settings, the seed, the
    demonstrations, the vocabulary, and the model's configuration and weights. The folder appears
    in one rename, so a run that is killed leaves nothing half-made there.
    Raises ValueError as `warm_start` does.
    """
    cache = Path(settings.cache)
    folder = cache / _fingerprint(model, tokenizer, task, settings, seed)
    if folder.exists():
        kept = type(model).from_pretrained(folder, dtype=model.dtype)
        model.load_state_dict(kept.state_dict())
        return folder
    warm_start(model, tokenizer, task, settings, seed, report, impl)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".unfinished-") as unfinished:
        complete = Path(unfinished) / "model"
        with naming(folder):
            save_model(complete, model)
            tokenizer.save_pretrained(complete)
        try:
            complete.rename(folder)
        except OSError:
            if not folder.exists():
                raise
            # Another run was at it too, and done first.
    return folder


def warm_start(
    model: Any,
    tokenizer: Any,
    task: Task,
    settings: WarmStart,
    seed: int,
    report: Report | None = None,
    impl: str = "auto",
) -> None:
    """Train `model` in place on the responses of `settings.traces` demonstrations of `task`.

    The loss is the mean of -log p over the response tokens of a batch, end-of-sequence included.
    AdamW with linear warm-up and a cosine to a tenth of the peak. On a CPU `seed`, the number of
    threads and the model's weights fix the result to the bit. `impl` is the backend of the head.
    Raises ValueError for a task without demonstrations and for steps, traces or batch size < 1.
    """
    for name in ("steps", "traces", "batch_size"):
        if getattr(settings, name) < 1:
            raise ValueError(f"a warm start needs {name} >= 1, not {getattr(settings, name)}")
    pairs = _demonstrator(task).demonstrations(settings.traces, seed)
    examples = [_example(tokenizer, problem, response) for problem, response in pairs]
    head = lm_head(model)
    order = _endless_order(len(examples), torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        betas=BETAS,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, settings))
    was_training = model.training
    model.train()
    began, tokens_done = time.monotonic(), 0
    for step in range(1, settings.steps + 1):
        batch = [examples[i] for i in islice(order, settings.batch_size)]
        loss, tokens = _loss(head, batch, impl)
        optimizer.zero_grad()
        loss.backward()
        _clip(model, step)
        optimizer.step()
        schedule.step()
        tokens_done += tokens
        if report is not None:
            speed = tokens_done / (time.monotonic() - began)
            report(step, {"loss": loss.item(), "tokens_per_second": speed})
    optimizer.zero_grad()
    model.train(was_training)


def _clip(model: Any, step: int) -> None:
    """Clip the gradient. Raises ValueError, which names the tensor, where it is not finite."""
    named = [(name, p) for name, p in model.named_parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for _, p in named])
    if not norm.isfinite():
        name = first_nonfinite([*model.named_parameters(), *((n, p.grad) for n, p in named)])
        raise ValueError(f"step {step} of the warm start: {name} or its gradient is not finite")
    torch.nn.utils.clip_grads_with_norm_([p for _, p in named], GRAD_CLIP, norm)


def _demonstrator(task: Task) -> Demonstrator:
    if not isinstance(task, Demonstrator):
        raise ValueError(
            f"task {task.name!r} has no demonstrations to warm-start from: set warm_start.steps to "
            "0, or name the column of worked responses with data.demonstration_field, or use a "
            'task that has demonstrations, such as "ladder"'
        )
    return task


def _example(tokenizer: Any, problem: Problem, response: str) -> Example:
    asked = prompt_ids(tokenizer, [problem])[0]
    answered = response_ids(tokenizer, response)
    return Example(torch.tensor([*asked, *answered, tokenizer.eos_token_id]), len(asked))


def _endless_order(count: int, generator: torch.Generator) -> Iterator[int]:
    """Endless permutations of 0..count-1, one after the other."""
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def _rate(step: int, settings: WarmStart) -> float:
    """The learning rate of `step`, from 0, as a share of the peak."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return FINAL_RATE + (1 - FINAL_RATE) * (1 + math.cos(math.pi * done)) / 2


def _loss(head: LMHead, batch: list[Example], impl: str = "auto") -> tuple[Tensor, int]:
    """The mean of -log p over the response tokens of `batch`, and their number."""
    # The last token predicts nothing, and a token is predicted by the one before it.
    read = [example.tokens[:-1] for example in batch]
    predicts = [torch.arange(len(e.tokens) - 1) >= e.start - 1 for e in batch]
    target_T = torch.cat([example.tokens[example.start :] for example in batch])
    tokens_N, predicts_N, target_T = (
        x.to(head.model.device) for x in (torch.cat(read), torch.cat(predicts), target_T)
    )
    packed = arrange(tokens_N, torch.tensor(list(map(len, read))), "padded")
    assert packed.mask_RW is not None
    hidden_RWD = head.hidden_states(
        input_ids=packed.tokens_RW, attention_mask=packed.mask_RW.long(), use_cache=False
    )
    hidden_TD = hidden_RWD.flatten(0, 1)[packed.index_T[predicts_N]]
    logprob_T = ek.linear_logprob_entropy(head(hidden_TD, target_T), impl=impl).logprob
    return -logprob_T.mean(), len(logprob_T)


def _fingerprint(model: Any, tokenizer: Any, task: Task, settings: WarmStart, seed: int) -> str:
    """A hash of all that shapes a warm start, except torch's version and the machine."""
    shaped_by = {key: value for key, value in asdict(settings).items() if key != "cache"}
    demonstrator = _demonstrator(task)
    # What a task generates without end is known by its first ones.
    count = _PROBED_DEMONSTRATIONS if task.num_train is None else settings.traces
    pairs = demonstrator.demonstrations(count, seed)
    probed = [(problem.prompt, response) for problem, response in pairs]
    parts = [_RECIPE, shaped_by, seed, task.name, probed, tokenizer.get_vocab()]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    digest.update(model.config.to_json_string().encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype}".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
