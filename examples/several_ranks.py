"""RL updates on several ranks with gradient accumulation: those of one process, to rounding.

    python examples/several_ranks.py
    torchrun --nproc-per-node 2 examples/several_ranks.py --micro-batches 3           # DDP
    torchrun --nproc-per-node 3 examples/several_ranks.py --micro-batches 3 --fsdp    # FSDP2

print the same lines, whatever the division: seven ragged sequences over the ranks, theirs over
micro-batches, some of which are empty. A Qwen3 of random weights; on a CPU, or on GPUs if any.

DDP and FSDP2 average gradients over ranks, and micro-batches add up. So each micro-batch's loss is
its own sum divided by N / W: N the tokens that the step keeps on all W ranks.
"""

import argparse
import contextlib
import os
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen3Config, Qwen3ForCausalLM

import entropy_kernels as ek
from entropy_kernels.integrations.hf import patch_lm_head

VOCABULARY, PROMPT_LENGTH, LENGTHS, UPDATES = 64, 4, (20, 3, 11, 20, 7, 16, 1), 3


def build_model(device: torch.device) -> nn.Module:
    """The same weights on every rank."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.06}
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCABULARY, **sizes, **heads, **special))
    return model.to(device)


def wrap(model: nn.Module, fsdp: bool) -> nn.Module:
    """`model` by FSDP2, or by DDP; its head returns log-probs and entropies of targets."""
    patch_lm_head(model)
    if not dist.is_initialized():
        return model
    if not fsdp:
        return DistributedDataParallel(model)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def micro_batches(rank: int, ranks: int, count: int, device: torch.device) -> list[dict]:
    """This rank's sequences in `count` micro-batches, as many on every rank.

    Where there are too few, a micro-batch is one sequence without a valid token: FSDP2 gathers
    weights in every forward, so that all ranks have to run it.
    """
    generator = torch.Generator().manual_seed(1)
    shape = len(LENGTHS), PROMPT_LENGTH + max(LENGTHS)
    tokens = torch.randint(VOCABULARY, shape, generator=generator)
    advantage = torch.randn(len(LENGTHS), generator=generator)
    # mask[t]: whether target[t], which position t predicts, is a token of the response.
    place = torch.arange(1, shape[1] + 1) - PROMPT_LENGTH
    mask = (place >= 0) & (place < torch.tensor(LENGTHS)[:, None])
    target = tokens.roll(-1, 1).masked_fill(~mask, -100)
    step = {"tokens": tokens, "target": target, "mask": mask, "advantage": advantage}
    parts = []
    for i in range(count):
        index = list(range(rank, len(LENGTHS), ranks))[i::count]
        part = {name: x[index or [0]].to(device) for name, x in step.items()}
        part["mask"] &= bool(index)
        parts.append(part)
    return parts


@torch.no_grad()
def score(model: nn.Module, parts: list[dict], group: dist.ProcessGroup | None) -> Tensor:
    """Old log-probs and selected tokens, into `parts`; the denominator of the step."""
    threshold = ek.StreamingThreshold(0.2, group=group)
    for part in parts:
        out = model(part["tokens"], target=part["target"])
        part["old_logprob"], part["entropy"] = out.logprob, out.entropy
        threshold.update(out.entropy, part["mask"])
    for part in parts:
        part["keep"] = threshold.mask(part["entropy"], part["mask"])
    return threshold.denominator()


def backward(
    model: nn.Module, parts: list[dict], denominator: Tensor, group: dist.ProcessGroup | None
) -> dict[str, Tensor]:
    """Leave the step's gradient on the parameters; the step's loss and metrics."""
    metrics = []
    for part in parts:
        with synchronised(model, part is parts[-1]):
            out = model(part["tokens"], target=part["target"].masked_fill(~part["keep"], -100))
            loss, found = ek.ratio_loss(
                out.logprob,
                part["old_logprob"],
                part["advantage"],
                part["mask"],
                selected=part["keep"],
                denominator=denominator,
            )
            loss.backward()
        metrics.append(found | {"loss": loss.detach()})
    return ek.distributed.join_metrics(metrics, group)


def synchronised(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Reduce gradients over ranks in the backward of the last micro-batch alone."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return contextlib.nullcontext()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--fsdp", action="store_true", help="FSDP2 instead of DDP")
    options = parser.parse_args()

    device, group = torch.device("cpu"), None
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        group = dist.group.WORLD
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if group is not None else (0, 1)

    model = wrap(build_model(device), options.fsdp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    parts = micro_batches(rank, ranks, options.micro_batches, device)
    denominator = score(model, parts, group)
    for update in range(UPDATES):
        found = backward(model, parts, denominator, group)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            chosen = f"{int(found['tokens/selected'])} of {int(found['tokens/all'])} tokens"
            loss = f"loss {found['loss']:+.4f}, gradient norm {norm:.4f}"
            print(f"update {update}: {loss}, ratio {found['ratio/mean']:.4f}, selected {chosen}")
    if group is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
