"""The training step of TRL's GRPOTrainer, with its own fused head and with ours.

One micro-batch: the trainer's own loss, DAPO's, and its backward, on completions that are there
already. No generation and no optimizer, which the head does not change. TRL's head is that of its
kernels; beside it, torch's linear_cross_entropy in its place. That one has no entropies, so it
trains on all tokens. The backbone has a single
layer, so that most of a step is the head, as in the largest vocabularies of small models.

On a CPU TRL scores prompts too; ours, like TRL on a GPU, the completions alone. One contestant is
TRL's function without the prompts, to tell the two apart.

B sequences, P length of the prompts, L of the completions, D hidden, V vocabulary.
"""

import copy
import functools
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks import runner
from benchmarks.runner import Contestant
from benchmarks.trl_grpo import grpo_trainer
from entropy_kernels._bench.others import torch_head

# The process that measures memory imports this module.
MODULE = "benchmarks.bench_trl_step"
# B, P, L, D, V with rounds: a narrow model, and the width of Qwen2.5-0.5B; Qwen's vocabulary.
SHAPES = {(8, 32, 128, 256, 151936): 5, (8, 64, 256, 896, 151936): 5}
QUICK = (4, 3, 8, 16, 96), 2
# With such initial weights, entropies lie between about 1 nat and half of log V.
SPREAD = 5.0
ROWS = 128


class Problem(NamedTuple):
    """One micro-batch, as the trainer hands it to its loss, and the sizes of its model."""

    prompt: Tensor  # [B, P]
    completion: Tensor  # [B, L]
    advantage: Tensor  # [B]
    hidden: int
    vocabulary: int


@pytest.mark.timeout(0)
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "B{}-P{}-L{}-D{}-V{}".format(*shape))
def bench_trl_step(shape, start, record):
    record(functools.partial(measure, *start(SHAPES, shape, QUICK)))


def measure(shape, rounds, folder, log=print):
    """The result file's entries."""
    names = "sequences", "prompt", "completion", "hidden", "vocabulary"
    return runner.measure(
        "trl_step",
        dict(zip(names, shape, strict=True)),
        contestants(),
        make_problem(*shape),
        truth,
        rounds=rounds,
        folder=folder,
        log=log,
        watched=None if shape in SHAPES else 0,
        module=MODULE,
    )


def make_problem(sequences: int, prompt: int, length: int, hidden: int, vocabulary: int) -> Problem:
    """Random tokens, and advantages none of which is zero."""
    generator = torch.Generator().manual_seed(0)
    return Problem(
        torch.randint(vocabulary, (sequences, prompt), generator=generator),
        torch.randint(vocabulary, (sequences, length), generator=generator),
        torch.linspace(-1.5, 1.25, sequences),
        hidden,
        vocabulary,
    )


def small_problem(like: Problem) -> Problem:
    """A small problem, whose run loads libraries, starts threads and builds the model."""
    return make_problem(2, 2, 4, like.hidden, like.vocabulary)


def contestants() -> list[Contestant]:
    """The first is what the others are compared with."""
    few, all_tokens = {"quantile": 0.2}, {"quantile": 1.0}
    needs = ("trl",)
    return [
        Contestant("trl", "TRL's head, 20% of the tokens", _theirs, few, needs=needs),
        Contestant(
            "trl-labels", "TRL's head, 20%, prompts not scored", _labelled, few, needs=needs
        ),
        Contestant("ours", "patch_trl(), 20% of the tokens", _ours, few, needs=needs),
        Contestant(
            "trl-all",
            "TRL's head, all tokens",
            functools.partial(_theirs, quantile=1.0),
            all_tokens,
            needs=needs,
        ),
        Contestant(
            "lce-all",
            "torch's linear_cross_entropy, no entropies, all tokens, prompts not scored",
            _by_torch,
            all_tokens,
            needs=needs,
        ),
        Contestant(
            "ours-all",
            "patch_trl(), all tokens",
            functools.partial(_ours, quantile=1.0),
            all_tokens,
            needs=needs,
        ),
    ]


def _theirs(problem: Problem, quantile: float = 0.2) -> dict[str, Tensor]:
    return _step(problem, quantile)


def _labelled(problem: Problem) -> dict[str, Tensor]:
    from trl.trainer import utils

    from entropy_kernels.integrations._patch import Patch

    with Patch((utils, "_use_triton", lambda device: True)):
        return _step(problem, 0.2)


class _TorchHead:
    """Stands in for TRL's function at a temperature of 1, with zeros for entropies."""

    @staticmethod
    def apply(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *others: Any
    ) -> tuple[Tensor | None, ...]:
        logprob = torch_head(hidden, weight, targets)[0]
        return logprob, torch.zeros_like(logprob), None, None, None


def _by_torch(problem: Problem) -> dict[str, Tensor]:
    from trl.trainer import utils

    from entropy_kernels.integrations._patch import Patch

    head = (utils, "_ChunkedLogProbFunction", _TorchHead)
    with Patch(head, (utils, "_use_triton", lambda device: True)):
        return _step(problem, 1.0)


def _ours(problem: Problem, quantile: float = 0.2) -> dict[str, Tensor]:
    from entropy_kernels.integrations.trl import patch_trl

    with patch_trl():
        return _step(problem, quantile)


def _step(problem: Problem, quantile: float) -> dict[str, Tensor]:
    """The loss, and the gradients of the head and of what stands right before it."""
    trainer = _trainer(problem.hidden, problem.vocabulary)
    trainer.top_entropy_quantile = quantile
    inputs: dict[str, Any] = {"advantages": problem.advantage}
    for name, ids in {"prompt": problem.prompt, "completion": problem.completion}.items():
        inputs |= {f"{name}_ids": ids, f"{name}_mask": torch.ones_like(ids)}
    inputs["num_items_in_batch"] = inputs["completion_mask"].sum()
    model = trainer.model.train()
    loss = trainer.compute_loss(model, inputs)
    loss.backward()
    found = {"loss": loss.detach(), "dweight": model.lm_head.weight.grad}
    found["dnorm"] = model.model.norm.weight.grad
    model.zero_grad(set_to_none=True)
    return found


@cache
def _trainer(hidden: int, vocabulary: int) -> Any:
    """A GRPOTrainer that never generates, on a Qwen3 of one layer."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=SPREAD / hidden**0.5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, "<unk>"))
    tokens = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **tokens)
    return grpo_trainer(Qwen3ForCausalLM(config), tokenizer, 2)


def truth(problem: Problem, quantile: float) -> dict[str, Tensor]:
    """The same in fp64, from logits of ROWS tokens at a time; the threshold as TRL interpolates it.

    On-policy every ratio is 1, so that the loss is -A / n per token and its gradient that of
    -A logp / n.
    """
    model = _trainer(problem.hidden, problem.vocabulary).model
    backbone = copy.deepcopy(model.model).double().train()
    weight_VD = model.lm_head.weight.detach().double().requires_grad_()
    ids_BT = torch.cat([problem.prompt, problem.completion], dim=1)
    start = problem.prompt.shape[1]
    states = backbone(input_ids=ids_BT).last_hidden_state[:, start - 1 : -1].flatten(0, 1)
    hidden_TD = states.detach().requires_grad_()
    target_T = problem.completion.flatten()
    entropy_T = torch.cat([_entropy(h, weight_VD) for h in hidden_TD.detach().split(ROWS)])
    keep_T = entropy_T >= entropy_T.float().quantile(1 - quantile) if quantile < 1 else None
    advantage_T = problem.advantage.double().repeat_interleave(problem.completion.shape[1])
    coefficient_T = -advantage_T / len(target_T)
    if keep_T is not None:
        coefficient_T = coefficient_T * keep_T
    for rows in coefficient_T.nonzero().squeeze(1).split(ROWS):
        logp_RV = (hidden_TD[rows] @ weight_VD.T).log_softmax(1)
        logprob_R = logp_RV.gather(1, target_T[rows, None]).squeeze(1)
        (coefficient_T[rows] * logprob_R).sum().backward()
    states.backward(hidden_TD.grad)
    return {
        "loss": coefficient_T.sum(),
        "dweight": weight_VD.grad,
        "dnorm": backbone.norm.weight.grad,
    }


@torch.no_grad()
def _entropy(hidden_RD: Tensor, weight_VD: Tensor) -> Tensor:
    return torch.special.entr((hidden_RD @ weight_VD.T).softmax(1)).sum(1)
