"""The gradient of the weight that embeds: where it is, without copies of it."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from trainer.model.embedding import one_gradient
from trainer.tiny.model import build_tiny

V, D = 200_000, 64


class Model(nn.Module):
    """An embedding and a head, which may share a weight."""

    def __init__(self, tied, kind=nn.Embedding):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = kind(V, D), nn.Linear(D, V, bias=False)
        self.embedding.padding_idx = 7  # a row without gradient
        if tied:
            self.head.weight = self.embedding.weight

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, ids, rows):
        return (self.embedding(ids) @ self.head.weight[rows].T).logsumexp(-1).sum()


def gradients(model, batches, inside):
    for ids, rows in batches:
        if inside:
            with one_gradient(model):
                model(ids, rows).backward()
        else:
            model(ids, rows).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
def test_the_gradient_is_the_same_over_several_micro_batches(tied):
    generator = torch.Generator().manual_seed(1)
    padding = torch.full((1, 10), 7)
    batches = [
        (
            torch.cat([torch.randint(0, V, (3, 10), generator=generator)] * 2 + [padding]),
            torch.arange(b, b + 50),
        )
        for b in range(3)
    ]
    want = gradients(Model(tied), batches, inside=False)
    model = Model(tied)
    found = gradients(model, batches, inside=True)
    assert found.keys() == want.keys()
    for name, grad in found.items():
        assert grad.layout == torch.strided
        torch.testing.assert_close(grad, want[name], atol=1e-5, rtol=1e-5)
    assert "forward" not in vars(model.embedding)


@pytest.mark.parametrize("inside", [True, False])
def test_no_other_tensor_of_the_weights_size_is_made(inside):
    model = Model(tied=True)
    weight = model.embedding.weight
    weight.grad = torch.zeros_like(weight)
    way = one_gradient(model) if inside else nullcontext()
    with torch.profiler.profile(profile_memory=True) as seen, way:
        model.embedding(torch.arange(40)).sum().backward()
    largest = max(event.cpu_memory_usage for event in seen.key_averages())
    # The second shows that the first could fail.
    assert largest < weight.nbytes / 10 if inside else largest >= weight.nbytes


@pytest.mark.parametrize(
    "why", ["frozen", "another kind", "hooks", "hooks after", "a largest norm"]
)
def test_what_does_not_fit_is_left(why):
    class Other(nn.Module):
        def __init__(self, rows, columns):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(rows, columns))

    model = Model(tied=False, kind=Other if why == "another kind" else nn.Embedding)
    model.embedding.weight.requires_grad_(why != "frozen")
    if why == "a largest norm":
        model.embedding.max_norm = 1.0
    if why == "hooks":
        model.embedding.weight.register_hook(lambda grad: grad * 2)
    if why == "hooks after":
        model.embedding.weight.register_post_accumulate_grad_hook(lambda weight: None)
    with one_gradient(model):
        assert model.embedding.weight.grad is None
        assert "forward" not in vars(model.embedding)


def test_an_error_leaves_the_embedding_as_it_was():
    model, _ = build_tiny(0, "eager", torch.float32)
    with pytest.raises(TypeError), one_gradient(model):
        model(input_ids="no tensor")
    assert "forward" not in vars(model.get_input_embeddings())
