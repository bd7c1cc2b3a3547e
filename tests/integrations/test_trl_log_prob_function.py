"""Our stand-in for TRL's chunked log-prob function, called as TRL's fused head calls it."""

import pytest
import torch

pytest.importorskip("trl", reason="the adapter is for TRL")

import transformers.integrations.deepspeed
from trl.kernels import ChunkedLogProbFunction
from trl.trainer import utils

import entropy_kernels as ek
from entropy_kernels._bounds import assert_within_two_bounds, worst_of_orders
from entropy_kernels.integrations.trl import LogProbFunction, patch_trl
from entropy_kernels.testing import peaked_head
from tests.trainer.small import WORDS, build_model

V = len(WORDS)
OURS = LogProbFunction()


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "cohere", "granite", "phi"])
@pytest.mark.parametrize("outputs", [("log_probs",), ("log_probs", "entropy")])
def test_a_fused_head_gives_what_it_gave(family, outputs):
    """Tied, softcapped, scaled, divided and biased heads; prompts and padding without labels."""
    ids = torch.randint(V, (3, 9))
    labels = ids.clone()
    labels[:, :3] = labels[2, 6:] = -100
    found = {}
    for name in ("theirs", "ours"):
        model = build_model(family)
        utils.add_fused_lm_head(model, temperature=0.8, outputs=outputs)
        patch = patch_trl() if name == "ours" else None
        out = model(input_ids=ids, labels=labels, fused_lm_head=True)
        values = [getattr(out, output) for output in outputs]
        sum((x * torch.arange(x.numel()).view_as(x).cos()).sum() for x in values).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found[name] = [x.detach() for x in (out.loss, *values, *grads)]
        assert out.entropy is None or "entropy" in outputs
        if patch is not None:
            patch.undo()
    assert len(found["ours"]) > 6
    for ours, theirs in zip(found["ours"], found["theirs"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6 * float(theirs.abs().max()))


def test_a_batch_without_a_label_gives_zero_gradients():
    model = build_model("qwen3")
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    with patch_trl():
        out = model(
            input_ids=torch.zeros(2, 5, dtype=torch.long),
            labels=torch.full((2, 5), -100),
            fused_lm_head=True,
        )
        (out.log_probs.sum() + out.entropy.sum()).backward()
    assert out.loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


HEADS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "softcap": {"softcap": 5.0},
    "scale": {"scale": 0.3, "temperature": 1.4},
    "scale-and-softcap": {"scale": 2.5, "softcap": 4.0, "temperature": 0.7},
    "bias": {"bias": True, "scale": 0.5, "softcap": 3.0},
}


def _exact(h, w, b, y, *, temperature, softcap, scale):
    """TRL's order of operations, in the dtype of the inputs."""
    z = (h @ w.T + (0 if b is None else b)) * scale
    z = z if softcap is None else softcap * (z / softcap).tanh()
    logp = (z / temperature).log_softmax(1)
    return logp.gather(1, y[:, None]).squeeze(1), -(logp.exp() * logp).sum(1)


def _outputs_and_gradients(function, h, w, b, dtype):
    leaves = [x.to(dtype).requires_grad_() for x in (h, w, b) if x is not None]
    logprob, entropy = function(*leaves, *[None] * (3 - len(leaves)))
    n = torch.arange(len(logprob), dtype=logprob.dtype)
    grads = torch.autograd.grad((logprob * n.cos() + entropy * n.sin()).sum(), leaves)
    return [logprob.detach(), entropy.detach(), *grads]


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("name", HEADS)
def test_scale_and_softcap_are_exact(name, autocast):
    """No further from fp64 than TRL's function; under autocast too, which rounds its logits."""
    options = {"temperature": 1.0, "softcap": None, "scale": 1.0} | HEADS[name]
    h, w, y = peaked_head(97, 24, 301)
    b = torch.randn(301) if options.pop("bias", False) else None

    def call(function):
        def run(h, w, b):
            t, cap, scale = options["temperature"], options["softcap"], options["scale"]
            outputs = ("log_probs", "entropy")
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return function.apply(h, w, b, y, t, 128, cap, scale, outputs)[:2]

        return run

    truth = _outputs_and_gradients(
        lambda h, w, b: _exact(h, w, b, y, **options), h, w, b, torch.float64
    )
    ours = _outputs_and_gradients(call(OURS), h, w, b, torch.float32)
    theirs = worst_of_orders(
        lambda: _outputs_and_gradients(call(ChunkedLogProbFunction), h, w, b, torch.float32), truth
    )
    for got, wanted, other in zip(ours, truth, theirs, strict=True):
        assert_within_two_bounds(got, wanted, eager=other, plain=other)


# The worst errors of log-probabilities and entropies against fp64: TRL's and ours.
ROUNDED = {
    "bf16": (torch.bfloat16, None, 5e-2, 5e-6),
    "fp16": (torch.float16, None, 6e-3, 2e-5),
    "autocast": (torch.float32, torch.bfloat16, 5e-2, 5e-6),
    "fp32": (torch.float32, None, 0.0, 2e-5),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_what_the_docstring_says_of_16_bits(name):
    """TRL's logits have the inputs' digits, ours are fp32; of fp32 inputs both are the same."""
    dtype, cast, least_of_theirs, most_of_ours = ROUNDED[name]
    h, w, y = peaked_head(512, 64, 2048, dtype=dtype)
    logits = h.to(cast or dtype).double() @ w.to(cast or dtype).double().T
    logp = logits.log_softmax(1)
    truth = logp.gather(1, y[:, None]).squeeze(1), -(logp.exp() * logp).sum(1)
    assert logits.abs().max() > 55
    worst = {}
    for function in (ChunkedLogProbFunction, OURS):
        outputs = ("log_probs", "entropy")
        with torch.autocast("cpu", cast or torch.bfloat16, enabled=cast is not None):
            found = function.apply(h, w, None, y, 1.0, 8192, None, 1.0, outputs)[:2]
        pairs = zip(found, truth, strict=True)
        worst[function] = [float((got - wanted).abs().max()) for got, wanted in pairs]
    assert max(worst[OURS]) < most_of_ours
    assert min(worst[ChunkedLogProbFunction]) >= least_of_theirs
    assert max(worst[ChunkedLogProbFunction]) < max(1.5 * least_of_theirs, 2e-5) + 6e-3


def test_a_weight_of_another_dtype_is_cast_to_that_of_the_hidden_states():
    h, w, y = peaked_head(13, 24, 101)
    h, w = h.bfloat16(), w.requires_grad_()
    outputs = ("log_probs", "entropy")
    logprob, entropy, *_ = OURS.apply(h, w, None, y, 1.0, 64, None, 1.0, outputs)
    (logprob.sum() + entropy.sum()).backward()
    assert w.grad.dtype == torch.float32
    wanted = ek.linear_logprob_entropy(ek.Head(h, w.detach().bfloat16(), y))
    torch.testing.assert_close(logprob.detach(), wanted.logprob, rtol=0, atol=0)
    torch.testing.assert_close(entropy.detach(), wanted.entropy, rtol=0, atol=0)


OTHERS = {
    "negative scale": {"scale": -1.0, "outputs": ("entropy", "mean_logits")},
    "negative temperature": {"temperature": -0.5},
    "negative softcap": {"softcap": -5.0},
    "softcap 0": {"softcap": 0.0},
    "fp64": {"dtype": torch.float64},
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_the_head_does_not_compute_goes_to_trl(name):
    plain = {"temperature": 0.7, "softcap": None, "scale": 1.0, "dtype": torch.float32}
    given = plain | {"outputs": ("log_probs", "entropy")} | OTHERS[name]
    h, w, y = peaked_head(13, 24, 101)
    h, w = h.to(given["dtype"]), w.to(given["dtype"])
    options = (given[key] for key in ("softcap", "scale", "outputs"))
    arguments = (h, w, None, y, given["temperature"], 64, *options)
    for ours, theirs in zip(
        OURS.apply(*arguments), ChunkedLogProbFunction.apply(*arguments), strict=True
    ):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)


@pytest.mark.parametrize("name", HEADS)
def test_statistics_are_those_of_the_same_pass(name):
    """log sum p^2, the mean of what TRL makes of the logits, and whether the label is argmax."""
    options = {"temperature": 1.0, "softcap": None, "scale": 1.0} | HEADS[name]
    h, w, y = peaked_head(57, 24, 301)
    h = h / 20  # lest the largest logits be equal at the softcap
    b = torch.randn(301) if options.pop("bias", False) else None
    z = (h.double() @ w.double().T + (0 if b is None else b)) * options["scale"]
    cap, temperature = options["softcap"], options["temperature"]
    z = (z if cap is None else cap * (z / cap).tanh()) / temperature
    y[::3] = z.argmax(1)[::3]
    outputs = ("log_probs", "log_sum_sq_probs", "mean_logits", "is_top1")
    found = OURS.apply(h, w, b, y, temperature, 64, cap, options["scale"], outputs)
    _, entropy, squares, mean, top = found
    wanted = z.softmax(1).square().sum(1).log()
    torch.testing.assert_close(squares.double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mean.double(), z.mean(1), rtol=1e-5, atol=1e-6)
    assert torch.equal(top, z.argmax(1) == y)
    assert 0 < int(top.sum()) < len(y)
    assert entropy is None
    none = OURS.apply(h, w, b, y, temperature, 64, cap, options["scale"], ("entropy",))
    assert none[2] is none[3] is none[4] is None


def test_zero_3_is_refused(monkeypatch):
    deepspeed = transformers.integrations.deepspeed
    monkeypatch.setattr(deepspeed, "is_deepspeed_zero3_enabled", lambda: True)
    h, w, y = peaked_head(3, 8, 11)
    with pytest.raises(ValueError, match="ZeRO-3"):
        OURS.apply(h, w, None, y, 1.0, 64, None, 1.0, ("log_probs",))
