"""patch_verl: verl's fused head computed by ours, through both of its backends, and put back.

The cases are those of verl's own tests of its fused kernels, smaller where a CPU wants it. Truth is
the reference in fp64; the other bound is verl's own result before the patch. T tokens, D hidden, V
vocabulary.
"""

import sys
from contextlib import nullcontext
from types import ModuleType

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels import reference
from entropy_kernels._bounds import assert_within_two_bounds, worst_of_orders
from entropy_kernels.integrations import verl as adapter
from entropy_kernels.integrations.verl import patch_verl
from entropy_kernels.testing import Watch, peaked_head
from tests.integrations.small_models import VOCABULARY, build
from tests.integrations.small_verl import core_algos, fused, heads, losses, monkey_patch

TEMPERATURE = 1.5
# T, D, V; verl's V. Hidden states are scaled so that the logits spread as at verl's D of 3584.
CASES = [(13, 28, 152064), (17, 14, 151936), (30, 32, 32256), (11, 64, 102400), (32, 16, 102400)]


@pytest.fixture(params=["torch", "liger"])
def backend(request):
    if request.param == "liger" and heads._LIGER_FUSED_LINEAR_SCALED_CROSS_ENTROPY is None:
        pytest.skip("liger-kernel is not installed")
    return request.param


@pytest.fixture
def patched():
    with patch_verl() as patch:
        yield patch


def inputs_of(case, dtype=torch.float32):
    """Uniform hidden states, weight and labels, and gradients in bf16, as verl's tests have."""
    T, D, V = case
    h = torch.empty(1, T, D).uniform_(-0.5, 0.5) * (3584 / D) ** 0.5
    w = torch.empty(V, D).uniform_(-0.5, 0.5)
    g_logprob = torch.empty(1, T).uniform_(-1, 1).bfloat16()
    g_entropy = torch.empty(1, T).uniform_(-0.5, 0.5).bfloat16()
    return h.to(dtype), w.to(dtype), torch.randint(V, (1, T)), g_logprob, g_entropy


def run(forward, h, w, y, g_logprob, g_entropy, temperature=TEMPERATURE):
    """log_probs, entropy, and the gradients of hidden states and weight."""
    h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
    out = forward(h, w, y, temperature)
    grads = [g.to(x.dtype) for g, x in zip((g_logprob, g_entropy), out, strict=True)]
    torch.autograd.backward(out, grads)
    return *(x.detach() for x in out), h.grad, w.grad


def truth_of(h, w, y, *rest, temperature=TEMPERATURE, dtype=torch.float64):
    """The same by the specification, in fp64."""

    def forward(h, w, y, temperature):
        if isinstance(temperature, torch.Tensor):
            temperature = temperature.reshape(-1).to(dtype)
        head = ek.Head(h.reshape(-1, h.shape[-1]), w, y.reshape(-1), temperature=temperature)
        found = reference.linear_logprob_entropy(head)
        return tuple(x.reshape(y.shape) for x in found[:2])

    return run(forward, h.to(dtype), w.to(dtype), y, *rest, temperature=temperature)


def bounded(inputs, got, before):
    """`before`: verl's, which counts as eager where it is not fp32."""
    dtype = inputs[0].dtype
    truth = truth_of(*inputs)
    plain = worst_of_orders(lambda: truth_of(*inputs, dtype=torch.float32), truth)
    eager = plain if dtype == torch.float32 else before
    for side, quartet in enumerate(zip(got, truth, eager, plain, strict=True)):
        # The compiled kernels round the operands of the gradients' products to bf16.
        operands = dtype if side >= 2 else torch.float32
        assert_within_two_bounds(*quartet, operands=operands)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "x".join(map(str, case)))
def test_verls_own_cases(case, backend):
    inputs = inputs_of(case)
    before = run(heads.FusedLinearForPPO(impl_backend=backend), *inputs)
    with patch_verl():
        got = run(heads.FusedLinearForPPO(impl_backend=backend), *inputs)
    bounded(inputs, got, before)
    for x, y in zip(got, before, strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
    # The tolerances of verl's test, against its own head.
    for x, y, atol in zip(got, before, (1e-4, 1e-4, 1e-2, 1e-2), strict=True):
        torch.testing.assert_close(x, y, atol=atol, rtol=1e-4)


def test_bf16_keeps_fp32_entropies_where_verl_rounds_them(backend):
    inputs = inputs_of((40, 32, 5003), torch.bfloat16)
    module = heads.FusedLinearForPPO(impl_backend=backend)
    before = run(module, *inputs)
    with patch_verl():
        got = run(module, *inputs)
    bounded(inputs, got, before)
    assert [x.dtype for x in got] == [torch.float32] * 2 + [torch.bfloat16] * 2
    assert before[1].dtype == torch.bfloat16
    truth = truth_of(*inputs)[1]
    assert (got[1] - truth).abs().max() < 0.01 * (before[1] - truth).abs().max()


@pytest.mark.parametrize("V", [152064, 149 * 1024], ids=["half a block over", "whole blocks"])
def test_columns_past_the_vocabulary_have_no_mass(V, patched):
    """verl's regression test: one logit of +3, all others -15; verl's kernel was 0.82 off."""
    w = torch.zeros(V, 8)
    w[:, 0], w[0, 0] = -15.0 * TEMPERATURE, 3.0 * TEMPERATURE
    h = torch.zeros(1, 5, 8)
    h[..., 0] = 1.0
    y = torch.zeros(1, 5, dtype=torch.int64)
    logprob, entropy = heads.FusedLinearForPPO()(h, w, y, TEMPERATURE)
    z = torch.full((V,), -15.0, dtype=torch.float64)
    z[0] = 3.0
    want = z.log_softmax(0)
    want_entropy = -(want.exp() * want).sum()
    torch.testing.assert_close(logprob.double(), want[0].expand(1, 5), rtol=1e-5, atol=0)
    torch.testing.assert_close(entropy.double(), want_entropy.expand(1, 5), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(24,), (1, 24), (4, 6)], ids=["T", "packed", "B x L"])
@pytest.mark.parametrize("temperature", [1.0, 0.6, "per token"])
def test_shapes_and_temperatures(shape, temperature, patched):
    h, w, y = peaked_head(24, 12, 301)
    h, y = h.reshape(*shape, 12), y.reshape(shape)
    if temperature == "per token":
        temperature = 0.5 + torch.rand(shape)
    inputs = h, w, y, torch.randn(shape), torch.randn(shape)
    got = run(heads.FusedLinearForPPO(), *inputs, temperature=temperature)
    truth = truth_of(*inputs, temperature=temperature)
    plain = worst_of_orders(
        lambda: truth_of(*inputs, temperature=temperature, dtype=torch.float32), truth
    )
    for x, want, other in zip(got, truth, plain, strict=True):
        assert x.shape == want.shape
        assert_within_two_bounds(x, want, other, other, factor=4.0)


@pytest.mark.parametrize("frozen", ["hidden_states", "vocab_weights"])
def test_a_frozen_input_gets_no_gradient_and_costs_no_product(frozen, patched):
    T, D, V = 20, 12, 301
    h, w, y = peaked_head(T, D, V)
    tensors = {"hidden_states": h, "vocab_weights": w}
    for name, x in tensors.items():
        x.requires_grad_(name != frozen)
    with Watch() as watch:
        logprob, _ = heads.FusedLinearForPPO()(input_ids=y, **tensors)
        logprob[:7].sum().backward()
    assert tensors[frozen].grad is None
    assert watch.products == (T + 2 * 7) * D * V


def test_backward_pays_for_rows_with_gradient_only(backend):
    """One product of T rows forward, three of the rows that get a gradient from either output."""
    T, D, V = 50, 16, 301
    h, w, y = peaked_head(T, D, V)
    g_logprob, g_entropy = torch.zeros(T), torch.zeros(T)
    g_logprob[3:9], g_entropy[7:11] = 1.0, -0.5
    module = heads.FusedLinearForPPO(impl_backend=backend)
    results, rows = [], []
    for patch in (nullcontext, patch_verl):
        with patch(), Watch() as watch:
            results.append(run(module, h, w, y, g_logprob, g_entropy))
        rows.append(watch.products / (D * V))
    assert rows == [T + 3 * T, T + 3 * 8]
    # Both are fp32: they differ by the rounding of logits, which are far larger than a log-prob.
    rounding = 4 * torch.finfo(torch.float32).eps * float((h @ w.T).detach().abs().max())
    for want, x in zip(*results, strict=True):
        torch.testing.assert_close(x, want, rtol=1e-4, atol=max(rounding, 1e-5))


def test_rows_without_a_label_give_zeros(patched):
    """As verl's backend "liger" has it; its backend "torch" has no such label."""
    h, w, y = peaked_head(10, 12, 301)
    y[2::3] = -100
    h.requires_grad_()
    logprob, entropy = heads.FusedLinearForPPO(impl_backend="liger")(h, w, y)
    (logprob + entropy).sum().backward()
    for x in (logprob, entropy, h.grad.abs().sum(1)):
        assert torch.equal(x == 0, y == -100)


def test_compiles_into_one_graph(patched, unchecked_shapes):
    """verl's test compiles the module; this is without its code generation."""
    inputs = inputs_of((16, 8, 301))
    module = heads.FusedLinearForPPO()
    compiled = torch.compile(
        lambda *args: module(*args), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for x, want in zip(run(compiled, *inputs), run(module, *inputs), strict=True):
        torch.testing.assert_close(x, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("labels", ["rolled by the engine", "rolled here"])
def test_a_model_that_verl_patched(labels, backend):
    model = fused(backend=backend)
    ids = torch.randint(VOCABULARY, (2, 11))
    given = {"temperature": 0.7, "return_dict": True, "use_cache": False}
    target = ids.roll(-1, 1)
    if labels == "rolled by the engine":
        # Not the roll of the ids: only these labels lead to these log-probs.
        target = torch.randint(VOCABULARY, (2, 11))
        given["shift_labels"] = target
    results = []
    for patch in (nullcontext, patch_verl):
        model.zero_grad()
        with patch():
            out = model(input_ids=ids, **given)
            (out.log_probs.square().sum() + 0.1 * out.entropy.sum()).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        results.append((out.log_probs.detach(), out.entropy.detach(), gradients))
    with torch.no_grad():
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        want = (hidden.double() @ model.lm_head.weight.double().T / 0.7).log_softmax(-1)
    want = want.gather(-1, target[..., None]).squeeze(-1)
    torch.testing.assert_close(results[1][0].double(), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[1][:2], results[0][:2], rtol=1e-4, atol=1e-5)
    for name, gradient in results[0][2].items():
        atol = 1e-5 * float(gradient.abs().max())
        torch.testing.assert_close(results[1][2][name], gradient, rtol=1e-3, atol=atol)


def test_a_backend_that_is_not_covered_raises(patched):
    with pytest.raises(ValueError, match="impl_backend torch and liger; got triton"):
        fused(backend="triton")
    # Nothing is fused: verl's own business.
    monkey_patch.patch_forward_with_backends(build("qwen3"), fused_kernels_backend="triton")


def attributes():
    return [
        heads.FusedLinearForPPO.forward,
        monkey_patch.patch_forward_with_backends,
        losses.ppo_loss,
        dict(core_algos.POLICY_LOSS_REGISTRY),
    ]


def test_undo_puts_everything_back_and_twice_is_once():
    before = attributes()
    patch = patch_verl(fraction=0.5)
    assert patch_verl(fraction=0.5) is patch
    assert all(x != y for x, y in zip(attributes(), before, strict=True))
    with pytest.raises(ValueError, match=r"patched with .*'fraction': 0.5"):
        patch_verl(fraction=0.2)
    patch.undo()
    assert attributes() == before
    patch.undo()
    with patch_verl(fraction=0.2) as other:
        assert other is not patch
    assert attributes() == before


def test_the_workers_copy_of_ppo_loss_is_replaced_too(monkeypatch):
    """The module of verl's actor, which needs more than is installed here, imports it by name."""
    worker = ModuleType("verl.workers.engine_workers")
    worker.ppo_loss = losses.ppo_loss
    monkeypatch.setitem(sys.modules, worker.__name__, worker)
    before = losses.ppo_loss
    with patch_verl():
        assert worker.ppo_loss is losses.ppo_loss
        assert worker.ppo_loss is not before
    assert worker.ppo_loss is before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, r"fraction must be a number in \(0, 1\]; got 0.0"),
        ({"fraction": 1.5}, r"fraction must be a number in \(0, 1\]; got 1.5"),
        ({"denominator": "some"}, "denominator must be .* got 'some'"),
    ],
)
def test_bad_options(options, message):
    before = attributes()
    with pytest.raises(ValueError, match=message):
        patch_verl(**options)
    assert attributes() == before


def test_a_loss_of_the_same_name_is_left_alone(monkeypatch):
    monkeypatch.setitem(core_algos.POLICY_LOSS_REGISTRY, "high_entropy", min)
    with pytest.raises(ValueError, match="has a policy loss 'high_entropy' already"):
        patch_verl()
    assert core_algos.POLICY_LOSS_REGISTRY["high_entropy"] is min


def test_another_version_raises(monkeypatch):
    monkeypatch.setattr("entropy_kernels.integrations._patch.version", lambda package: "0.10.0")
    with pytest.raises(ImportError, match=r"verl>=0.9,<0.10, .*got 0.10.0"):
        patch_verl()


def test_the_module_for_verls_workers_patches_with_the_papers_settings(monkeypatch):
    from verl.utils.import_utils import import_external_libs

    name = "entropy_kernels.integrations.verl_external_lib"
    monkeypatch.delitem(sys.modules, name, raising=False)
    before = attributes()
    import_external_libs(name)
    patch = adapter._in_force
    assert patch.active
    assert patch.options == {
        "impl": "auto",
        "fraction": 0.2,
        "over_ranks": False,
        "denominator": "selected",
        "entropy_source": "current",
        "sets": False,
    }
    patch.undo()
    assert attributes() == before
