"""FSDP2 and DDP on two processes: the gradients of a patched model are those of one process."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import entropy_kernels as ek
from entropy_kernels.integrations._head import as_linear
from entropy_kernels.integrations.hf import lm_head, patch_lm_head
from tests.integrations.small_models import (
    assert_same_gradients,
    batch,
    build,
    fill_lora,
    gradients,
)
from tests.processes import spawn

RANKS = 2
# Family, units of their own besides the root, and whether sharding comes first.
CASES = {
    "root": ("qwen3", [], True),
    "layers": ("gemma2", ["layers"], False),
    "head of its own": ("qwen3", ["layers", "head"], True),
    "head of its own, patched first": ("cohere-untied", ["layers", "head"], False),
    "tied": ("qwen3-tied", ["layers"], True),
    "LoRA on the head": ("lora", ["layers", "head"], True),
    "DDP of a compiled model": ("granite", ["DDP"], False),
}


def make(family):
    if family == "cohere-untied":
        return build("cohere", tie_word_embeddings=False)
    if family != "lora":
        return build(family)
    import peft

    torch.manual_seed(5)
    settings = peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=4)
    return fill_lora(peft.get_peft_model(build("qwen3"), settings))


def shard(model, units):
    """What is called instead of the model from now on."""
    if units == ["DDP"] and isinstance(model, Loop):
        return DistributedDataParallel(model)
    if units == ["DDP"]:
        compiled = torch.compile(model, backend="aot_eager", dynamic=False, fullgraph=True)
        return DistributedDataParallel(compiled)
    inner = model.model if isinstance(model, Loop) else model
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    if "layers" in units:
        for layer in inner.model.layers:
            fully_shard(layer)
    if "head" in units:
        fully_shard(inner.lm_head)
    return fully_shard(model)


class Loop(nn.Module):
    """A module of one's own that runs the model and the head, as its `lm_head`."""

    def __init__(self, model):
        super().__init__()
        self.model, self.head = model, lm_head(model)

    def forward(self, target, **inputs):
        states = self.head(self.head.hidden_states(**inputs), target)
        found = ek.linear_logprob_entropy(states)._asdict()
        return {name: x.clone() for name, x in found.items() if x is not None}


def whole(grad):
    """The sum over the ranks of what each computed; FSDP and DDP average."""
    if grad is None:
        return None
    return RANKS * (grad.full_tensor() if isinstance(grad, DTensor) else grad)


def on_rank(rank, folder):
    """Gradients on this rank's sequences, averaged by FSDP, and the found log-probs."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated")
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    try:
        results = {}
        for case, (family, units, sharded_first) in CASES.items():
            model = make(family)
            if not sharded_first:
                patch_lm_head(model)
            called = shard(model, units)
            patch_lm_head(model)
            tokens = {name: x.chunk(RANKS)[rank] for name, x in batch(sequences=4).items()}
            found = called(**tokens)
            grads = gradients(model, found, share=(RANKS, rank))
            results[case] = {n: whole(grad) for n, grad in grads.items()}, found.logprob.detach()
            if case == "LoRA on the head":
                _check_refused(model)
            message = "its `module`" if "DDP" in units else "is what fully_shard was given"
            with pytest.raises(ValueError, match=message):
                lm_head(called).hidden_states(tokens["input_ids"])
            loop = Loop(make(family))
            called = shard(loop, units)
            if "head" in units:
                with pytest.raises(ValueError, match=r"a unit of its own, use patch_lm_head"):
                    called(**tokens)
                continue
            for _ in range(2):  # also where a step before has left something
                found = called(**tokens)
                grads = gradients(loop.model, found, share=(RANKS, rank))
            grads = {n: whole(grad) for n, grad in grads.items()}
            results[f"{case}, by lm_head"] = grads, found["logprob"].detach()
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def _check_refused(model):
    """The head outside of the modules whose hooks gather it."""
    head = model.get_base_model().lm_head
    head.reshard()
    with pytest.raises(ValueError, match=r"DTensor .*Shard\(dim=0\).* during forward"):
        as_linear(head, torch.zeros(2, 16))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
def test_two_ranks_give_the_gradients_of_one_process(tmp_path):
    pytest.importorskip("peft", reason="one of the models has LoRA on its head")
    spawn(on_rank, args=(str(tmp_path),), nprocs=RANKS)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]
    for case, (family, units, _) in CASES.items():
        model = make(family)
        with patch_lm_head(model):
            want = model(**batch(sequences=4))
            want_grads = gradients(model, want)
        names = [case] if "head" in units else [case, f"{case}, by lm_head"]
        for name in names:
            logprob = torch.cat([results[name][1] for results in found])
            torch.testing.assert_close(logprob, want.logprob.detach(), rtol=1e-6, atol=1e-6)
            for results in found:
                assert_same_gradients(results[name][0], want_grads)
