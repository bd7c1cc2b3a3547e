"""Models, a tokenizer and a task so small that an RL step takes milliseconds."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import trainer.run
from trainer.batch import Rollouts
from trainer.config import Algorithm, Config, Eval, Model, Optimizer, Reward, Rollout
from trainer.engines.engine import Engine
from trainer.engines.transformers import TransformersEngine
from trainer.log import read_rows
from trainer.policy import Policy, check_policy, read_policy
from trainer.rewards.verifier import Verifier
from trainer.sampling import sample
from trainer.tasks.problem import Problem
from trainer.train import train

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
WORDS = [PAD, EOS, UNKNOWN, *"0123456789", "+", "=", "<user>", "<assistant>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<user> {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)
POSITIONS = 64

_COMMON = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": POSITIONS,
}
# Heads: plain; tied; plain, in a sliding window; softcapped; scaled; divided; multiplied by what is
# named as the divisor is; with a bias; and tied, with positions by distance and learned ones. Last,
# a model whose base_model is itself.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 1}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"num_key_value_heads": 1, "sliding_window": 4}),
    "gemma2": (
        "Gemma2",
        {"num_key_value_heads": 1, "head_dim": 8, "final_logit_softcapping": 3.0},
    ),
    "cohere": ("Cohere", {"num_key_value_heads": 1, "logit_scale": 0.25}),
    "granite": ("Granite", {"num_key_value_heads": 1, "logits_scaling": 4.0}),
    "hyperclovax": (
        "HyperCLOVAX",
        {"num_key_value_heads": 1, "head_dim": 8, "logits_scaling": 0.3},
    ),
    "phi": ("Phi", {}),
    "bloom": ("Bloom", {}),
    "gpt2": ("GPT2", {}),
    "llama4": (
        "Llama4Text",
        {
            "num_key_value_heads": 1,
            "head_dim": 8,
            "num_local_experts": 2,
            "intermediate_size_mlp": 32,
        },
    ),
}


def build_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """One token a word of WORDS; text is words with spaces between."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"pad_token": PAD, "eos_token": EOS, "unk_token": UNKNOWN} | options
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **named)


def build_model(
    family: str = "llama",
    *,
    seed: int = 0,
    spread: float = 0.5,
    attention: str = "eager",
    **changes: Any,
) -> Any:
    """A model of random weights; with the `spread` of their start its logits differ by a few.

    `changes` are settings of its configuration.
    """
    name, own = FAMILIES[family]
    return make_model(name, seed, spread, attention, **own | changes)


def make_model(
    name: str, seed: int = 0, spread: float = 0.5, attention: str = "eager", **own: Any
) -> Any:
    """A model of the classes that transformers calls `name`, with settings of its `own`."""
    settings = getattr(transformers, f"{name}Config")(
        **_COMMON | own,
        initializer_range=spread,
        bos_token_id=None,
        pad_token_id=WORDS.index(PAD),
        eos_token_id=WORDS.index(EOS),
        attn_implementation=attention,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        suffix = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
        built = getattr(transformers, name.removesuffix("Text") + suffix)(settings).eval()
        bias = getattr(built.get_output_embeddings(), "bias", None)
        if bias is not None:
            torch.nn.init.normal_(bias)
    return built


def build_policy(family: str = "llama", **options: Any) -> Policy:
    """A small model with the small tokenizer."""
    policy = Policy(build_model(family, **options), build_tokenizer())
    check_policy(policy)
    return policy


def save_folder(folder: Path, family: str = "llama", **options: Any) -> str:
    """A transformers folder with a small model and the tokenizer, chat template included."""
    build_model(family, **options).save_pretrained(folder)
    build_tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(folder)
    return str(folder)


def load_policy(settings: Model) -> Policy:
    """The policy of `settings`, checked and ready to train."""
    policy = read_policy(settings, 0)
    check_policy(policy)
    return policy


class Even:
    """Prompts of one to four digits; a right response starts with an even digit."""

    name = "even"
    num_train = None
    num_test = 8

    def __init__(self, pause: float = 0.0):
        self.pause = pause

    def problem(self, split: str, index: int) -> Problem:
        digits = [(index * 7 + i * 3 + (split == "test")) % 10 for i in range(1 + index % 4)]
        return Problem(" + ".join(map(str, digits)) + " =", None)

    def reward(self, problem: Problem, response: str) -> float:
        time.sleep(self.pause)
        return float(response[:1] in tuple("02468"))


EVEN = [Even().problem("train", index) for index in range(32)]


def sampled(
    policy: Policy,
    problems: Sequence[Problem],
    engine: Engine | None = None,
    verifier: Verifier | None = None,
    **options: Any,
) -> Rollouts:
    """Responses to `problems`, by default of transformers' engine and verified as Even does."""
    engine = engine or TransformersEngine(policy, 64)
    verifier = verifier or Verifier(Even(), Reward())
    asked: dict[str, Any] = {"group_size": 4, "temperature": 1.0, "seed": 0} | options
    return sample(engine, policy, verifier, problems, **asked)


def settings(root: Path, model: str = "tiny", **changes: Any) -> Config:
    """Six steps of a few milliseconds, a checkpoint every two; `changes` to the outer fields."""
    return replace(
        Config(
            name="run",
            root=str(root),
            seed=3,
            steps=6,
            threads=1,
            device="cpu",
            eval=Eval(every=3, problems=4),
            checkpoint_every=2,
            samples_every=2,
            samples=2,
            model=Model(path=model),
            rollout=Rollout(prompts=4, group_size=4, max_new_tokens=6, batch_size=16),
            algorithm=Algorithm(min_groups=1, max_rounds=2),
            optimizer=Optimizer(learning_rate=1e-2, tokens_per_micro_batch=64),
        ),
        **changes,
    )


def make_rollouts(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], **fields: Any
) -> Rollouts:
    """Sequences of these token ids; `fields` in place of empty texts and verdicts of 0."""
    nothing = torch.zeros(len(prompts), dtype=torch.bool)
    pairs = zip(prompts, answers, strict=True)
    plain: dict[str, Any] = {
        "problems": [Problem("", None)] * len(prompts),
        "responses": [""] * len(prompts),
        "group_B": torch.arange(len(prompts)),
        "tokens_N": torch.tensor([token for pair in pairs for part in pair for token in part]),
        "prompt_length_B": torch.tensor(list(map(len, prompts))),
        "response_length_B": torch.tensor(list(map(len, answers))),
        "sampler_logprob_T": torch.zeros(sum(map(len, answers))),
        "sampler_entropy_T": torch.zeros(sum(map(len, answers))),
        "truncated_B": nothing,
        "reward_B": nothing.float(),
        "timed_out_B": nothing,
        "crashed_B": nothing,
    }
    return Rollouts(**plain | fields)


def sequences(rollouts: Rollouts) -> list[tuple[Tensor, Tensor]]:
    """The prompt and the response of each sequence, in token ids."""
    parts = torch.stack([rollouts.prompt_length_B, rollouts.response_length_B], 1).flatten()
    tokens = rollouts.tokens_N.split(parts.tolist())
    return list(zip(tokens[::2], tokens[1::2], strict=True))


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what a clock says."""
    return [
        {k: v for k, v in row.items() if not k.startswith("time/") and k != "tokens_per_second"}
        for row in read_rows(folder / "metrics.jsonl")
    ]


def elsewhere(config: Config, root: Path, **changes: Any) -> Config:
    """The same run in another place."""
    return replace(config, root=str(root), **changes)


def use_task(task: Any) -> None:
    """Let every run of this process work on `task`."""
    trainer.run.make_task = lambda *_: task


@pytest.fixture(scope="module", autouse=True)
def on_even() -> Iterator[None]:
    """Runs of a module that imports it work on Even."""
    task = trainer.run.make_task
    use_task(Even())
    yield
    trainer.run.make_task = task


def train_even(config: Config, pause: float = 0.0) -> None:
    """`train` on Even; for processes of their own."""
    use_task(Even(pause))
    train(config)
