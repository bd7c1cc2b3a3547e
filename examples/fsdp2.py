"""RL updates on the fifth of the tokens with the highest entropies, sharded by FSDP2.

    torchrun --nproc-per-node 8 examples/fsdp2.py --model Qwen/Qwen3-8B-Base

prints the same on any number of ranks. Tokens and advantages are random, in the place of sampled
ones. Logits [T, V] are never made, and backward runs on the selected rows.
"""

import argparse

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM

import entropy_kernels as ek
from entropy_kernels.integrations.hf import patch_lm_head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Qwen/Qwen3-8B-Base")
    parser.add_argument("--shape", type=int, nargs=2, default=(8, 512), help="sequences, tokens")
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if gpu:
        torch.cuda.set_device(rank % torch.cuda.device_count())
    device = torch.device("cuda" if gpu else "cpu")
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(device)
    patch_lm_head(model)
    for part in (*model.model.layers, model):
        fully_shard(part, mp_policy=MixedPrecisionPolicy(torch.bfloat16 if gpu else None))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    torch.manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, tuple(options.shape))[rank::ranks].to(device)
    advantage = torch.randn(options.shape[0])[rank::ranks].to(device)
    target = tokens.roll(-1, 1)
    target[:, -1] = -100  # the token that each position predicts; the last predicts none
    with torch.no_grad():
        old = model(tokens, target=target)
    keep = ek.top_entropy_mask(old.entropy, target >= 0, fraction=0.2, group=dist.group.WORLD)
    dist.all_reduce(count := keep.sum())
    for step in range(3):
        out = model(tokens, target=target.masked_fill(~keep, -100))
        kept = {"selected": keep, "denominator": count / ranks}  # FSDP averages over ranks
        loss, _ = ek.ratio_loss(out.logprob, old.logprob, advantage, target >= 0, **kept)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss := loss.detach() / ranks)
        if rank == 0:
            print(f"step {step}: loss {loss:+.4f}, gradient norm {norm:.4f}, selected {count}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
