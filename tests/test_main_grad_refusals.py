"""Memory that the weight's gradient may be added to, and memory that is refused: `main_grad`."""

import functools

import pytest
import torch

from entropy_kernels.testing import peaked_head
from tests.head_cases import logprob_entropy
from tests.loss_cases import policy_loss


def flat(w):
    """The weight in memory that holds more, and a buffer that begins inside of it."""
    memory = torch.zeros(2 * w.numel())
    weight = memory[: w.numel()].view(w.shape).requires_grad_()
    return weight, memory[w.numel() - 1 : -1].view(w.shape)


@torch.inference_mode()
def of_inference():
    return torch.zeros(67, 8)


BAD = {
    "shape": (lambda h, w: (h, w, torch.zeros(67, 9)), r"\(67, 8\) on cpu.*; got \(67, 9\) on cpu"),
    "device": (lambda h, w: (h, w, torch.zeros(67, 8, device="meta")), "on cpu.*got .* on meta"),
    "dtype": (lambda h, w: (h, w, w.detach().double()), "float32.*; got torch.float64"),
    "another 16 bits": (
        lambda h, w: (h.half(), w.detach().half().requires_grad_(), torch.zeros(67, 8).bfloat16()),
        "torch.float32 or torch.float16.*; got torch.bfloat16",
    ),
    "an integer": (lambda h, w: (h, w, torch.zeros(67, 8).int()), "got torch.int32"),
    "strides": (lambda h, w: (h, w, torch.zeros(8, 67).T), r"contiguous; got strides \(1, 67\)"),
    "sparse": (lambda h, w: (h, w, torch.zeros(67, 8).to_sparse()), "contiguous; got torch.sparse"),
    "a gradient": (lambda h, w: (h, w, torch.zeros(67, 8).requires_grad_()), "requires grad"),
    "a frozen weight": (lambda h, w: (h, w.detach(), torch.zeros(67, 8)), "frozen"),
    "the weight": (lambda h, w: (h, w, w.detach()), "own; got some of weight's"),
    "its neighbour": (lambda h, w: (h, *flat(w)), "own; got some of weight's"),
    "hidden": (lambda h, w: (h, w, h.detach()[:67]), "own; got some of hidden's"),
    "of inference": (lambda h, w: (h, w, of_inference()), "made under torch.inference_mode"),
    "a number": (lambda h, w: (h, w, 1.0), "be a tensor; got 1.0"),
}


@pytest.mark.parametrize("entry", ["head", "loss"])
@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_added_to_is_refused_before_anything_runs(
    change, message, entry, unchecked_shapes
):
    h, w, y = peaked_head(70, 8, 67)
    h, w, main_grad = change(h.requires_grad_(), w.requires_grad_())
    mask = torch.ones(70, dtype=torch.bool)
    call = {
        "head": functools.partial(logprob_entropy, h, w, y),
        "loss": functools.partial(policy_loss, h, w, y, None, torch.ones(70), mask, selected=mask),
    }[entry]
    with pytest.raises(ValueError, match="main_grad .*" + message):
        call(main_grad=main_grad)


def test_neighbours_in_memory_are_no_overlap():
    """As in one flat buffer of weights and gradients."""
    h, w, y = peaked_head(9, 8, 67)
    memory = torch.zeros(3, 67, 8)
    memory[1] = w
    weight = memory[1].requires_grad_()
    before = weight.detach().clone()
    for main_grad in (memory.detach()[0], memory.detach()[2]):
        logprob_entropy(h, weight, y, main_grad=main_grad).logprob.sum().backward()
    assert torch.equal(weight, before)
    assert torch.equal(memory[0], memory[2])
    assert (memory[0] != 0).any()
