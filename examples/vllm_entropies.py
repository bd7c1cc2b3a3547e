"""Entropies of a response's tokens out of vLLM, the fifth with the highest marked.

    python examples/vllm_entropies.py Qwen/Qwen3-0.6B "Prove that 7 divides 2^3 - 1."

Needs vLLM 0.32 or newer. Nothing of the model runs a second time.
"""

import argparse

import torch

import entropy_kernels as ek
from entropy_kernels.integrations import vllm as entropies


def main(model: str, prompts: list[str], dtype: str) -> None:
    from vllm import LLM, SamplingParams

    # A few short answers need little memory, of which vLLM takes most by default, and no compiler.
    options = {"logprobs_mode": "processed_logprobs", "max_model_len": 512}
    options |= {"kv_cache_memory_bytes": 2**28, "enforce_eager": True}
    llm = LLM(model, dtype=dtype, **entropies.options(**options))
    params = SamplingParams(temperature=1.0, top_p=0.95, max_tokens=64, seed=0)
    # Each request has a key. sets=True: the ids that top-p left to each token, too.
    asking = [entropies.recorded(params, key, sets=True) for key in range(len(prompts))]
    answers = llm.generate(prompts, asking)
    tokens = [torch.tensor(answer.outputs[0].token_ids) for answer in answers]
    found = entropies.take(llm, range(len(prompts)), map(len, tokens))

    # The mask is over all tokens together, as in training.
    entropy = torch.cat([one.entropies for one in found]).unsqueeze(0)
    keep = ek.top_entropy_mask(entropy, torch.ones_like(entropy, dtype=torch.bool), fraction=0.2)
    masks = keep[0].split(list(map(len, tokens)))
    tokenizer = llm.get_tokenizer()
    for prompt, ids, one, mask in zip(prompts, tokens, found, masks, strict=True):
        print(prompt)
        sizes = one.kept.sizes if one.kept else [0] * len(ids)
        for token, nats, size, marked in zip(ids, one.entropies, sizes, mask, strict=True):
            word = tokenizer.decode([int(token)])
            print(f"{'*' if marked else ' '} {nats:6.3f} nats, {int(size):4} kept  {word!r}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="Qwen/Qwen3-0.6B")
    parser.add_argument("prompts", nargs="*", default=["What is 7 times 8?", "Name a colour."])
    parser.add_argument("--dtype", default="auto", help="vLLM's dtype of weights")
    main(**vars(parser.parse_args()))
