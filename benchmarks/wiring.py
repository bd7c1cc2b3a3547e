"""The metrics of the first step of a loop that is wired right, and of loops that are not.

python -m benchmarks.wiring            prints the table
python -m benchmarks.wiring --write    rewrites it in docs/method.md between its markers

A small policy, trained for seconds so that its predictions mean something, samples responses at a
temperature and with a softcap. Then the loss is called on them: as it should be, and with one
mistake at a time. B sequences, L tokens each, D hidden, V vocabulary.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

import entropy_kernels as ek
from benchmarks import tables
from benchmarks.report import between_markers

PAGE = Path(__file__).parents[1] / "docs" / "method.md"
METRICS = ("ratio/mean", "ratio/max", "kl/k1", "kl/k3", "entropy/mean")

PAD, EOS, FIRST, V = 0, 1, 2, 34  # FIRST to 17 are words of responses, 18 to 33 of prompts.
WORDS, SEQUENCES, PROMPT, RESPONSE = 16, 128, 6, 16
STEPS, BATCH, RATE = 120, 32, 5e-3
TEMPERATURE, SOFTCAP, DROPOUT = 0.7, 6.0, 0.1


class Batch(NamedTuple):
    """A rollout: prompts are padded on the left, responses on the right."""

    tokens: Tensor  # [B, L]
    attention: Tensor  # [B, L], not padding
    response: Tensor  # bool [B, L]
    old_logprob: Tensor  # [B, L], of each token under the sampling policy; 0 outside of responses
    advantage: Tensor  # [B]


def build_model() -> Qwen3ForCausalLM:
    """A random Qwen3 of two layers; its attention has dropout in train mode."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "attention_dropout": DROPOUT}
    special = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD}
    config = Qwen3Config(vocab_size=V, attn_implementation="eager", **sizes, **heads, **special)
    return Qwen3ForCausalLM(config).eval()


def hidden_states(model: Any, tokens: Tensor, attention: Tensor | None) -> Tensor:
    """[B, L, D]; positions count from the first token that is no padding."""
    places = None if attention is None else (attention.cumsum(1) - 1).clamp_min(0)
    backbone = model.base_model(tokens, attention_mask=attention, position_ids=places)
    return backbone.last_hidden_state


def prompts(count: int) -> tuple[Tensor, Tensor]:
    """Tokens and attention [count, PROMPT]: two words or more, the padding on the left."""
    tokens = torch.randint(FIRST + WORDS, V, (count, PROMPT))
    padding = torch.randint(0, PROMPT - 1, (count, 1))
    attention = torch.arange(PROMPT) >= padding
    return tokens.masked_fill(~attention, PAD), attention.long()


def roll_out(next_token: Callable[[Tensor, Tensor], Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Prompts, continued up to an end of sequence; tokens and attention [count, L]."""
    tokens, attention = prompts(count)
    going = torch.ones(count, 1, dtype=torch.long)
    for _ in range(RESPONSE):
        token = torch.where(going > 0, next_token(tokens, attention), PAD)
        tokens, attention = torch.cat([tokens, token], 1), torch.cat([attention, going], 1)
        going = going * (token != EOS)
    return tokens, attention


def train(model: Any) -> None:
    """On chains: a word follows the one before it with fixed probabilities, some sharp."""
    follows = (2.5 * torch.randn(V, FIRST + WORDS)).index_fill(1, torch.tensor([PAD]), -torch.inf)
    follows[:, EOS] -= 2.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    for _ in range(STEPS):
        tokens, attention = roll_out(
            lambda seen, _: torch.multinomial(follows[seen[:, -1]].softmax(1), 1), BATCH
        )
        target = tokens[:, 1:].masked_fill(attention[:, 1:] == 0, -100)
        target[:, : PROMPT - 1] = -100
        hidden = hidden_states(model, tokens, attention)[:, :-1]
        head = ek.linear_logprob_entropy(ek.Head(hidden, model.lm_head.weight, target))
        loss = -head.logprob.sum() / (target != -100).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def sample(model: Any) -> Batch:
    """Responses of the policy, at its temperature and with its softcap."""

    def logits(tokens: Tensor, attention: Tensor) -> Tensor:
        z = hidden_states(model, tokens, attention) @ model.lm_head.weight.T
        return SOFTCAP * torch.tanh(z / SOFTCAP) / TEMPERATURE

    tokens, attention = roll_out(
        lambda seen, valid: torch.multinomial(logits(seen, valid)[:, -1].softmax(1), 1), SEQUENCES
    )
    response = (attention > 0) & (torch.arange(tokens.shape[1]) >= PROMPT)
    logprob = logits(tokens, attention).log_softmax(-1)[:, :-1]
    logprob = logprob.gather(2, tokens[:, 1:, None]).squeeze(2)
    old = torch.cat([torch.zeros(len(tokens), 1), logprob], 1)
    return Batch(tokens, attention, response, old.where(response, 0.0), torch.randn(len(tokens)))


def right(model: Any, batch: Batch) -> dict[str, Any]:
    """The arguments of `high_entropy_policy_loss`, as they should be."""
    return {
        "hidden": hidden_states(model, batch.tokens, batch.attention)[:, :-1],
        "weight": model.lm_head.weight,
        "target": batch.tokens[:, 1:],
        "old_logprob": batch.old_logprob[:, 1:],
        "advantage": batch.advantage,
        "mask": batch.response[:, 1:],
        "temperature": TEMPERATURE,
        "softcap": SOFTCAP,
    }


def mistakes(model: Any, batch: Batch) -> dict[str, dict[str, Any]]:
    """One wrong argument, or two that go together, for each row of the table."""
    old, tokens = batch.old_logprob, batch.tokens
    hidden = hidden_states(model, tokens, batch.attention)
    without = ek.linear_logprob_entropy(
        ek.Head(hidden[:, :-1], model.lm_head.weight, tokens[:, 1:], softcap=SOFTCAP)
    ).logprob
    flush_right = torch.zeros_like(old)
    for row, response in enumerate(batch.response):
        flush_right[row, len(response) - int(response.sum()) :] = old[row, response]
    # The dropout of the row below, whatever was drawn before.
    torch.manual_seed(1)
    dropped = hidden_states(model.train(), tokens, batch.attention)[:, :-1]
    model.eval()
    return {
        "target not shifted: `input_ids[:, :-1]`": {"target": tokens[:, :-1]},
        "hidden not shifted: `[:, 1:]`": {"hidden": hidden[:, 1:]},
        "mask not shifted: `response_mask[:, :-1]`": {"mask": batch.response[:, :-1]},
        "`old_logprob` not shifted": {"old_logprob": old[:, :-1]},
        "`temperature=` forgotten in the loss": {"temperature": 1.0},
        "`old_logprob` of temperature 1": {"old_logprob": without},
        "`softcap=` or scale forgotten": {"softcap": None},
        "`old_logprob` are probabilities": {"old_logprob": old[:, 1:].exp()},
        "`old_logprob` are NLL (no minus)": {"old_logprob": -old[:, 1:]},
        "prompt tokens in the mask": {"mask": batch.attention[:, 1:] > 0},
        "padding in the mask": {"mask": torch.arange(1, tokens.shape[1]).expand_as(old[:, 1:]) > 5},
        "responses padded on the other side in `old_logprob`": {"old_logprob": flush_right[:, 1:]},
        "attention mask forgotten, padding on the left": {
            "hidden": hidden_states(model, tokens, None)[:, :-1]
        },
        f"dropout {DROPOUT:g} on (`model.train()`)": {"hidden": dropped},
    }


def shown(arguments: dict[str, Any]) -> dict[str, float]:
    """The metrics of a loss over all tokens of the mask, as on a GPU, where no value is checked."""
    names = ("hidden", "weight", "target")
    scale = {name: arguments[name] for name in ("temperature", "softcap")}
    head = ek.linear_logprob_entropy(ek.Head(*(arguments[name] for name in names), **scale))
    mask = arguments["mask"]
    log_ratio = (head.logprob - arguments["old_logprob"])[mask].clamp(-20, 20).double()
    ratio = log_ratio.exp()
    values = ratio.mean(), ratio.max(), -log_ratio.mean(), (ratio - 1 - log_ratio).mean()
    found = dict(zip(METRICS, map(float, values), strict=False))
    return found | {"entropy/mean": float(head.entropy[mask].mean())}


@torch.no_grad()
def measure() -> dict[str, dict[str, float]]:
    """The metrics of each row; the first is the right one. On one thread: the sizes are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model()
        with torch.enable_grad():
            train(model)
        batch = sample(model)
        arguments = right(model, batch)
        found = {"nothing": arguments}
        found |= {name: arguments | wrong for name, wrong in mistakes(model, batch).items()}
    torch.set_num_threads(threads)
    return {name: shown(given) for name, given in found.items()}


def table(found: dict[str, dict[str, float]]) -> str:
    """A Markdown table with one row per mistake."""
    rows = [[name, *(number(row[metric]) for metric in METRICS)] for name, row in found.items()]
    return tables.table(["what is wrong", *(f"`{name}`" for name in METRICS)], rows)


def number(value: float) -> str:
    """Three digits; rounding is 0, and a large number has its power of ten."""
    return f"{value:.1e}" if abs(value) >= 1000 else f"{round(value, 3) + 0.0:.3g}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="rewrite the table in docs/method.md")
    block = table(measure())
    if parser.parse_args(arguments).write:
        PAGE.write_text(between_markers(PAGE, block, "wiring"))
    print(block)


if __name__ == "__main__":
    main()
