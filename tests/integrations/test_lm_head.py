"""lm_head: log-probs and gradients of every model are those of its own logits."""

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
    assert_same_gradients,
    batch,
    build,
    by_logits,
    gradients,
    has,
    head_in_fp64,
)

NAMES = ("logprob", "entropy", "logsumexp")


def by_head(head, tokens, temperature=1.0):
    """What a training loop of one's own does."""
    inputs = {name: x for name, x in tokens.items() if name != "target"}
    hidden = head.hidden_states(**inputs)
    found = ek.linear_logprob_entropy(head(hidden, tokens["target"], temperature))
    return found._asdict()


def check(model, found, want, want_grads, digits=2e-5):
    for name in NAMES:
        torch.testing.assert_close(found[name].double(), want[name].double(), rtol=2e-6, atol=2e-6)
    assert_same_gradients(gradients(model, found), want_grads, digits)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family(family):
    if not has(family):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    model, tokens = build(family), batch()
    with head_in_fp64(model):
        want = by_logits(model, tokens, 0.7)
        want_grads = gradients(model, want)
    head = lm_head(model)
    check(model, by_head(head, tokens, 0.7), want, want_grads)
    weight = head(torch.zeros(1, 16), torch.zeros(1).long()).weight
    assert weight is model.get_output_embeddings().weight
    with patch_lm_head(model):
        check(model, by_head(lm_head(model), tokens, 0.7), want, want_grads)
        assert model(**tokens).logprob.shape == tokens["target"].shape
    assert "forward" not in vars(model.get_output_embeddings())


@pytest.mark.parametrize("family", ["gemma2", "hyperclovax", "minicpm3", "gemma3-images"])
def test_weights_are_not_read_when_the_head_is_found(family):
    """They may be on "meta" then, and have their values later."""
    if not has(family):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    with torch.device("meta"):
        model = build(family)
    head, other = lm_head(model), lm_head(build(family))
    assert (head.scale, head.softcap) == (other.scale, other.softcap)


def test_a_temperature_a_token():
    model, tokens = build("gemma2"), batch()
    temperature = 0.5 + torch.rand(tokens["target"].shape)
    want = by_logits(model, tokens, temperature)
    check(model, by_head(lm_head(model), tokens, temperature), want, gradients(model, want))


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
    head = lm_head(model)
    assert head.softcap == 3.0
    for _ in range(2):
        check(model, by_head(head, tokens), want, want_grads)
    inputs = {name: x for name, x in tokens.items() if name != "target"}
    assert model(**inputs).logits.shape == (3, 11, VOCABULARY)


def test_logits_never_exist_and_backward_runs_on_rows_with_gradient():
    T, D, V = 128, 16, 4099
    model = build("qwen3", vocab_size=V).requires_grad_(False)
    model.lm_head.weight.requires_grad_()
    tokens = torch.randint(V, (1, T))
    head = lm_head(model)
    with Watch() as forward:
        hidden = head.hidden_states(tokens)
        found = ek.linear_logprob_entropy(head(hidden, tokens.roll(-1, 1)))
    keep = ek.top_entropy_mask(found.entropy.detach(), fraction=0.2)
    with Watch() as backward:
        (found.logprob * keep).sum().backward()
    assert backward.products == 2 * 26 * V * D
    assert max(forward.largest, backward.largest) < T * V / 2


def test_options_reach_the_model():
    model, tokens = build("llama"), batch()
    want = by_logits(model, tokens)["logprob"][:, -4:]
    head = lm_head(model)
    hidden = head.hidden_states(
        tokens["input_ids"], attention_mask=tokens["attention_mask"], logits_to_keep=4
    )
    found = ek.linear_logprob_entropy(head(hidden, tokens["target"][:, -4:]))
    torch.testing.assert_close(found.logprob, want)


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
        (lambda model: nn.Linear(2, 2), "got a Linear$"),
    ],
    ids=["DDP", "torch.compile", "backbone", "layer"],
)
def test_what_is_no_causal_lm_is_refused(function, make, message):
    with pytest.raises(ValueError, match=message):
        function(make(build("qwen3")))
