"""The blocks of torch as on a GPU: fewer passes over logits, with the values of the others.

T tokens, D hidden, V vocabulary.
"""

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from entropy_kernels._torch import blocks, head_backward, head_forward
from entropy_kernels.head import Head
from entropy_kernels.verification.truth import run
from tests.head_cases import assert_as_reference, make
from tests.marks import sampled
from tests.test_linear_logprob_entropy import (  # noqa: F401
    test_a_bad_row_poisons_itself_alone,
    test_a_bad_weight_poisons_every_row_but_the_ignored,
    test_a_logit_of_inf_leaves_no_distribution,
    test_a_masked_vocabulary_is_legal,
    test_each_output_alone,
    test_entropies_keep_their_digits_down_to_1e_12,
    test_entropy_is_never_negative_and_logprob_never_positive,
    test_options,
    test_rows_of_every_kind,
)
from tests.traffic import Traffic

pytestmark = sampled(0.2)


@pytest.fixture(params=[("torch", "cpu")], ids=["torch as on a GPU"])
def backend(request):
    return request.param


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    for module in (head_forward, head_backward):
        monkeypatch.setattr(module, "few_passes", lambda x: True)


@pytest.fixture
def products_of_16_bits(monkeypatch):
    """As a GPU has them; they are seen by no dispatch mode."""

    def product(left, right):
        with _disable_current_modes():
            return left.float() @ right.float()

    for module in (blocks, head_forward, head_backward):
        monkeypatch.setattr(module, "compute_dtype", lambda x: x)
        if hasattr(module, "product"):
            monkeypatch.setattr(module, "product", product)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("entropy", [False, True])
def test_16_bits_as_on_a_gpu(products_of_16_bits, head, bias, softcap, entropy):
    h, w, y = make("peaked", (33, 16, 1031), torch.bfloat16)
    b = torch.randn(1031).bfloat16() if bias else None
    grads = torch.randn(33), torch.randn(33) if entropy else None, torch.randn(33)
    got = run(head, (h, w, y, b), grads, softcap=softcap)
    assert_as_reference(got, (h, w, y, b), grads, operands=torch.bfloat16, softcap=softcap)


@pytest.mark.parametrize(
    ("options", "forward", "backward", "with_entropy"),
    [
        ({}, 28, 22, 42),
        ({"temperature": torch.full((1,), 0.5)}, 44, 30, 50),
        ({"bias": torch.randn(4096).bfloat16()}, 36, 42, 62),
    ],
    ids=["plain", "temperature", "bias"],
)
def test_bytes_of_traffic_per_logit_beside_products(
    products_of_16_bits, options, forward, backward, with_entropy
):
    """A product writes or reads 4, 2 and 2 more."""
    T, V = 256, 4096
    h, w = torch.randn(T, 8).bfloat16(), torch.randn(V, 8).bfloat16()
    head = Head(h, w, torch.randint(V, (T,)), **options).flat()
    with Traffic(T * 512) as traffic:
        rows = head_forward.forward(head, keep_logits=False)
    assert traffic.bytes / (T * V) == pytest.approx(forward, abs=0.6)
    for grad_entropy, wanted in ((None, backward), (torch.randn(T), with_entropy)):
        gradients = torch.randn(T), grad_entropy, None
        with Traffic(T * 512) as traffic:
            head_backward.backward(gradients, head, rows, (True, True, "bias" in options))
        assert traffic.bytes / (T * V) == pytest.approx(wanted, abs=0.6)
