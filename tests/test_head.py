"""Head: the form that backends take, its parts, and that no field is lost on the way.

T tokens, D hidden, V vocabulary.
"""

from contextlib import contextmanager
from dataclasses import fields, replace

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels import ops
from entropy_kernels.testing import peaked_head
from tests.traffic import Traffic

DEFAULTS = {field.name: field.default for field in fields(ek.Head)}


def make(**options):
    h, w, y = peaked_head(6, 8, 31)
    return ek.Head(h.reshape(2, 3, 8), w, y.reshape(2, 3).int(), **options)


def full():
    """A head of which no field has its default."""
    temperature, bias = torch.rand(2, 3) + 0.5, torch.randn(31)
    head = make(bias=bias, temperature=temperature, softcap=5.0, ignore_index=-1, logit_scale=2.0)
    assert all(getattr(head, name) is not default for name, default in DEFAULTS.items())
    return head


def outputs(head, **options):
    given = {field.name: getattr(head, field.name) for field in fields(head)}
    return ek.linear_logprob_entropy(ek.Head(**given, **options), impl="torch")


def test_flat_is_what_backends_take():
    flat = full().flat()
    assert flat.hidden.shape == (6, 8)
    assert flat.target.dtype == torch.int64
    assert flat.temperature.dtype == torch.float32
    assert flat.temperature.shape == (6,)
    assert make().flat().temperature is None
    assert make(temperature=0.5).flat().temperature.tolist() == [0.5]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert full().flat().bias.dtype == torch.bfloat16


def test_every_field_is_in_the_ops_schema_or_folded_by_flat():
    flat = full().flat()
    for name, default in DEFAULTS.items():
        assert name in ops.in_schema(flat) or getattr(flat, name) == default, name


def test_split_and_joined_lose_nothing():
    head = full().flat()
    again = ek.Head.joined(*head.split())
    assert all(getattr(again, name) is getattr(head, name) for name in DEFAULTS)


@pytest.mark.parametrize("temperature", [0.7, torch.tensor([0.7]), torch.rand(2, 3) + 0.5])
def test_the_head_at_some_tokens_gives_their_outputs(temperature):
    head, index_R = replace(full(), temperature=temperature), torch.tensor([4, 0, 3])
    for every, some in zip(outputs(head)[:3], outputs(head.at(index_R))[:3], strict=True):
        torch.testing.assert_close(every.reshape(-1)[index_R], some)


@pytest.mark.parametrize("cache", [True, False], ids=["cached", "not cached"])
def test_a_region_of_autocast_casts_a_trained_weight_once(cache):
    """As torch's own layers have it, which share the cast; its gradient is fp32."""
    head = make()
    head.weight.requires_grad_()
    regions = []
    for _ in range(2):
        head.weight.grad = None
        region = torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cache)
        with Traffic(head.weight.numel()) as traffic, count_unpacked() as unpacked, region:
            with torch.no_grad():
                outputs(head)
            for _ in range(3):
                torch.nn.functional.linear(head.hidden, head.weight)
                assert head.flat().weight.requires_grad
        regions.append(traffic.names.count("_to_copy"))
        assert unpacked == []
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cache):
            for _ in range(3):
                outputs(head).logprob.sum().backward()
    # One without gradients, which no layer may find; the others', and those of 3 layers.
    assert regions == [1 + (1 if cache else 6)] * 2
    assert head.weight.grad.dtype == torch.float32
    alone = head.weight.detach().bfloat16().requires_grad_()
    for _ in range(3):
        hidden = head.hidden.bfloat16()
        outputs(replace(head, hidden=hidden, weight=alone)).logprob.sum().backward()
    torch.testing.assert_close(head.weight.grad, alone.grad.float(), rtol=2**-6, atol=1e-3)


@contextmanager
def count_unpacked():
    """What hooks of saved tensors, such as those of activation checkpointing, give back."""
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: seen.append(x) or x):
        yield seen


@pytest.mark.parametrize("head", [{}, None, torch.ones(2, 3)], ids=["dict", "None", "tensor"])
def test_what_is_no_head_is_refused(head, unchecked_shapes):
    with pytest.raises(ValueError, match="head must be a Head; got"):
        ek.linear_logprob_entropy(head)
