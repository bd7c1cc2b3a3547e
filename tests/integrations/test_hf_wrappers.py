"""What others put on a model's forward, before our patch and after it: the log-probs stay those of
the model's logits, or an error says what to do."""

import functools
import types

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels.integrations.hf import LogprobEntropyOutput, lm_head, patch_lm_head
from tests.integrations.small_models import batch, build, by_logits
from tests.marks import sampled

accelerate = pytest.importorskip("accelerate", reason="its wrappers are what is tested")
pytestmark = [
    sampled(0.2),
    pytest.mark.usefixtures("unchecked_shapes"),
    # torch.compile's, where the tests' checks of shapes break a graph.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
# Wrappers are dynamo's: what compiles a graph behind it is not.
COMPILE = {"backend": "eager", "dynamic": False}


@pytest.fixture(autouse=True)
def _no_state_of_other_tests():
    """accelerate keeps the precision that a process began with."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def make():
    return build("qwen3", num_hidden_layers=1)


def accelerator():
    return accelerate.Accelerator(mixed_precision="bf16", cpu=True)


def prepared(model):
    return accelerator().prepare(model)


def prepared_and_unwrapped(model):
    return accelerator().unwrap_model(prepared(model), keep_fp32_wrapper=False)


def replaced(model, make):
    model.forward = make(model, model.forward)
    return model


def bound(function, model):
    return types.MethodType(function, model)


def closure(forward):
    return lambda *args, **options: forward(*args, **options)


def method(forward):
    """`forward` as a function of the model too."""
    return functools.wraps(forward)(lambda self, *args, **options: forward(*args, **options))


def liger_forward():
    return pytest.importorskip(
        "liger_kernel.transformers.model.qwen3", reason="Liger's forward"
    ).lce_forward


def compiled_in_place(model):
    model.compile(**COMPILE)
    return model


def compiled_head_in_place(model):
    model.lm_head.compile(**COMPILE)
    return model


def compiled(model):
    return torch.compile(model, **COMPILE)


def compiled_regions(model):
    return accelerate.utils.compile_regions(model, **COMPILE)


def dispatched(model):
    devices = {"model": "cpu", "lm_head": "cpu"}
    return accelerate.dispatch_model(model, devices, main_device="cpu", force_hooks=True)


def dispatched_and_freed(model):
    return accelerate.hooks.remove_hook_from_module(dispatched(model), recurse=True)


def hooked_twice(model):
    for append in (False, True):
        hook = accelerate.hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True)
        accelerate.hooks.add_hook_to_module(model, hook, append=append)
    return model


def with_a_hook_of_options(model):
    model.register_forward_pre_hook(
        lambda module, args, options: (args, {**options, "position_ids": None}), with_kwargs=True
    )
    return model


def of_trl(model):
    utils = pytest.importorskip("trl.trainer.utils", reason="TRL's forward")
    utils.add_fused_lm_head(model, outputs=("log_probs",))
    return model


# What is put in the place of a model's forward. "of the class" is as by a library that brings a
# forward of its own, such as Liger.
FORWARDS = {
    "decorated": lambda model, forward: functools.wraps(forward)(closure(forward)),
    "replaced_by_a_closure": lambda model, forward: closure(forward),
    "decorated_and_bound": lambda model, forward: bound(method(forward), model),
    "bound_again": lambda model, forward: bound(getattr(forward, "__func__", forward), model),
    "under_autocast": lambda model, forward: torch.autocast("cpu", torch.bfloat16)(forward),
    "with_grad": lambda model, forward: torch.enable_grad()(forward),
    "compiled_forward": lambda model, forward: torch.compile(forward, **COMPILE),
    "of_the_class": lambda model, forward: bound(type(model).forward, model),
    "of_liger": lambda model, forward: bound(liger_forward(), model),
}
OTHERS = (
    *(prepared, prepared_and_unwrapped, dispatched, dispatched_and_freed, hooked_twice),
    *(compiled_in_place, compiled_head_in_place, compiled, compiled_regions),
    *(with_a_hook_of_options, of_trl),
)
WRAPPERS = {wrapper.__name__: wrapper for wrapper in OTHERS} | {
    name: functools.partial(replaced, make=make) for name, make in FORWARDS.items()
}
# Errors of those that come after the patch, and before it.
REPLACED = "was replaced since patch_lm_head and does not know `target`"
AFTER = {"of_the_class": REPLACED, "of_liger": REPLACED}
BEFORE = {
    "compiled": "give patch_lm_head its `_orig_mod`",
    "compiled_regions": "got OptimizedModule",
}
SIXTEEN_BITS = ("prepared", "under_autocast")


def inputs(tokens):
    return {name: x for name, x in tokens.items() if name != "target"}


def check(wrapper, found, model):
    """Values, and a gradient of the head and of what lies below."""
    digits = 0.15 if wrapper in SIXTEEN_BITS else 2e-6
    want = by_logits(make(), batch())["logprob"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, want, rtol=digits, atol=digits)
    found.sum().backward()
    for parameter in (model.lm_head.weight, model.model.layers[0].mlp.up_proj.weight):
        assert parameter.grad.abs().max() > 1e-3
    model.zero_grad()


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_after_the_patch(wrapper):
    model, tokens = make(), batch()
    patch = patch_lm_head(model)
    called = WRAPPERS[wrapper](model)
    if wrapper in AFTER:
        with pytest.raises(ValueError, match=AFTER[wrapper]):
            called(**tokens)
        patch_lm_head(model)
    for _ in range(2):
        found = called(**tokens)
        assert isinstance(found, LogprobEntropyOutput)
        check(wrapper, found.logprob, model)
    assert called(**inputs(tokens)).logits is not None
    if wrapper not in ("replaced_by_a_closure", "of_trl", *AFTER):
        assert patch_lm_head(model) is patch


@pytest.mark.parametrize("wrapper", BEFORE)
@pytest.mark.parametrize("function", [lm_head, patch_lm_head])
def test_refused_before_the_patch(function, wrapper):
    with pytest.raises(ValueError, match=BEFORE[wrapper]):
        function(WRAPPERS[wrapper](make()))


@pytest.mark.parametrize("wrapper", [name for name in WRAPPERS if name not in BEFORE])
def test_before_the_patch(wrapper):
    model, tokens = make(), batch()
    called = WRAPPERS[wrapper](model)
    with patch_lm_head(called) as patch:
        for _ in range(2):
            check(wrapper, called(**tokens).logprob, model)
        assert patch_lm_head(called) is patch
        assert called(**inputs(tokens)).logits is not None
    assert not isinstance(called(**inputs(tokens)), LogprobEntropyOutput)


@pytest.mark.parametrize("wrapper", [name for name in WRAPPERS if name not in BEFORE])
def test_of_the_head_alone(wrapper):
    model, tokens = make(), batch()
    called = WRAPPERS[wrapper](model)
    head = lm_head(called)
    for _ in range(2):
        hidden = head.hidden_states(**inputs(tokens))
        found = ek.linear_logprob_entropy(head(hidden, tokens["target"]))
        check(wrapper, found.logprob, model)


def test_mixed_precision_is_taken_off_below_the_patch():
    model, tokens = make(), batch()
    model = prepared(model)
    with patch_lm_head(model) as patch:
        check("prepared", model(**tokens).logprob, model)
        model = accelerator().unwrap_model(model, keep_fp32_wrapper=False)
        check(None, model(**tokens).logprob, model)
        assert patch_lm_head(model) is patch


def test_the_patch_is_undone_after_unwrapping():
    model, tokens = make(), batch()
    patch = patch_lm_head(model)
    model = prepared_and_unwrapped(model)
    patch.undo()
    assert "forward" not in vars(model)
    assert not model._forward_hooks
    assert not isinstance(model(**inputs(tokens)), LogprobEntropyOutput)


def test_what_an_instance_does_to_its_logits_is_measured():
    """Not only what its class does."""
    model, tokens = make(), batch()
    forward = model.forward

    def louder(*args, **options):
        output = forward(*args, **options)
        output.logits = 3 * torch.tanh(2 * output.logits / 3)
        return output

    model.forward = louder
    want = by_logits(model, tokens)["logprob"]
    head = lm_head(model)
    assert (head.scale, head.softcap) == pytest.approx((2, 3))
    with patch_lm_head(model):
        torch.testing.assert_close(model(**tokens).logprob, want, rtol=1e-5, atol=1e-5)


def test_nothing_is_compiled_to_measure_a_head():
    seen = []
    model = make()
    model.forward = torch.compile(model.forward, backend=lambda graph, _: seen.append(graph))
    assert lm_head(model).scale == 1
    assert not seen
