"""lm_head and patch_lm_head: every model's log-probs and gradients are those of its own logits."""

import pytest
import torch
import transformers
from torch import nn
from transformers import Qwen3ForCausalLM

import entropy_kernels as ek
from entropy_kernels.integrations.hf import lm_head, patch_lm_head
from entropy_kernels.testing import Watch
from tests.integrations.small_models import (
    FAMILIES,
    VOCABULARY,
    assert_as_in_fp64,
    assert_same_gradients,
    batch,
    build,
    by_head,
    by_head_under_the_patch,
    by_logits,
    by_patch,
    gradients,
    has,
)
from tests.marks import sampled

pytestmark = sampled(0.2)

ROUTES = pytest.mark.parametrize("route", [by_head, by_patch], ids=["lm_head", "patch_lm_head"])


@pytest.mark.parametrize("route", [by_head, by_patch, by_head_under_the_patch])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family(family, route):
    if not has(family):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    model = build(family)
    weight = model.get_output_embeddings().weight
    tied = weight is model.get_input_embeddings().weight
    assert tied == bool(FAMILIES[family][1].get("tie_word_embeddings"))
    found = assert_as_in_fp64(route, model, batch(), 0.7)
    assert found["entropy"].max() > 1
    assert lm_head(model)(torch.zeros(1, 16), torch.zeros(1).long()).weight is weight
    if route is by_patch:
        assert found.past_key_values is None
        patch_lm_head(model).undo()
        assert "forward" not in vars(model.get_output_embeddings())


@pytest.mark.parametrize("family", ["gemma2", "hyperclovax", "minicpm3", "gemma3-images"])
def test_weights_are_not_read_when_the_head_is_found(family):
    """They may be on "meta" then, and have their values later."""
    if not has(family):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    with torch.device("meta"):
        model = build(family)
    other = lm_head(build(family))
    with patch_lm_head(model):
        patched = model.get_output_embeddings().forward.lm_head
    for head in (lm_head(model), patched):
        assert (head.scale, head.softcap) == (other.scale, other.softcap)


@ROUTES
def test_a_temperature_a_token(route):
    tokens = batch()
    assert_as_in_fp64(route, build("gemma2"), tokens, 0.5 + torch.rand(tokens["target"].shape))


# torch.compile's, where the tests' checks of shapes break a graph.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("how", ["backbone", "in place", "forward", "head in place"])
def test_compiled(how, unchecked_shapes):
    model, tokens = build("gemma2", num_hidden_layers=1), batch()
    want = by_logits(model, tokens)
    want_grads = gradients(model, want)
    options = {"backend": "aot_eager", "dynamic": False}
    if how == "backbone":
        model.model = torch.compile(model.model, **options)
        want_grads = {
            name.replace("model.", "model._orig_mod.", 1): grad for name, grad in want_grads.items()
        }
    elif how == "forward":
        model.forward = torch.compile(model.forward, **options)
    else:
        (model if how == "in place" else model.lm_head).compile(**options)
    head, inputs = lm_head(model), {name: x for name, x in tokens.items() if name != "target"}
    assert head.softcap == 3.0
    for _ in range(2):
        states = head(head.hidden_states(**inputs), tokens["target"])
        found = ek.linear_logprob_entropy(states)._asdict()
        for name, truth in want.items():
            torch.testing.assert_close(found[name], truth, rtol=2e-6, atol=2e-6)
        assert_same_gradients(gradients(model, found), want_grads)
    assert model(**inputs).logits.shape == (3, 11, VOCABULARY)


@ROUTES
def test_logits_never_exist_and_backward_runs_on_rows_with_gradient(route):
    T, D, V = 128, 16, 4099
    model = build("qwen3", vocab_size=V).requires_grad_(False)
    model.lm_head.weight.requires_grad_()
    tokens = torch.randint(V, (1, T))
    with Watch() as forward:
        found = route(model, {"input_ids": tokens, "target": tokens.roll(-1, 1)})
    keep = ek.top_entropy_mask(found["entropy"].detach(), fraction=0.2)
    assert keep.sum() == 26
    with Watch() as backward:
        (found["logprob"] * keep).sum().backward()
    assert backward.products == 2 * 26 * V * D
    assert max(forward.largest, backward.largest) < T * V / 2
    assert found["logprob"].numel() == T


@ROUTES
def test_options_reach_the_model(route):
    model, tokens = build("llama"), batch()
    want = by_logits(model, tokens)["logprob"][:, -4:]
    kept = tokens | {"target": tokens["target"][:, -4:]}
    torch.testing.assert_close(route(model, kept, logits_to_keep=4)["logprob"], want)


def test_what_a_call_cannot_honour():
    model, tokens = build("qwen3"), batch()
    head = lm_head(model)
    with pytest.raises(ValueError, match="labels"):
        head.hidden_states(tokens["input_ids"], labels=tokens["target"])
    model.lm_head.register_forward_pre_hook(
        lambda module, args, options: (args, {**options, "adapter_names": ["a"]}), with_kwargs=True
    )
    for call in (head.hidden_states, lambda ids: patched(model, ids)):
        with pytest.raises(ValueError, match="hidden states alone; got adapter_names"):
            call(tokens["input_ids"])
    model.lm_head = nn.Sequential(nn.Linear(16, VOCABULARY))
    with pytest.raises(ValueError, match="got Sequential"):
        head(torch.zeros(1, 16), torch.zeros(1).long())


def patched(model, ids):
    with patch_lm_head(model):
        model(ids, target=ids)


def test_a_model_that_calls_its_head_twice_or_never_is_told():
    class Twice(Qwen3ForCausalLM):
        times = 1

        def forward(self, *args, **options):
            for _ in range(self.times):
                output = super().forward(*args, **options)
            return output if self.times else self.model(*args, **options)

    model = Twice(build("qwen3").config).eval()
    head = lm_head(model)
    for times, message in ((2, "twice"), (0, "did not call its head")):
        model.times = times
        with pytest.raises(ValueError, match=message):
            head.hidden_states(torch.ones(1, 3, dtype=torch.long))
        assert "forward" not in vars(model.lm_head)


class Wrapper(nn.Module):
    """As DDP and torch.compile keep what they wrap."""

    def __init__(self, model, name):
        super().__init__()
        setattr(self, name, model)


@pytest.mark.parametrize("function", [lm_head, patch_lm_head])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: Wrapper(model, "module"), "got a Wrapper: give patch_lm_head its `module`"),
        (
            lambda model: torch.compile(model, backend="eager"),
            "got a OptimizedModule: give patch_lm_head its `_orig_mod`",
        ),
        (lambda model: model.model, "a backbone and a head"),
        (lambda model: nn.Linear(2, 2), "PeftModel of one.*got a Linear$"),
    ],
    ids=["DDP", "torch.compile", "backbone", "layer"],
)
def test_what_is_no_causal_lm_is_refused(function, make, message):
    with pytest.raises(ValueError, match=message):
        function(make(build("qwen3")))
