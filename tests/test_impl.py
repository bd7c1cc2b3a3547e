"""`impl=`: wherever a public function takes it, that backend computes head, selection and loss."""

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels import backends
from entropy_kernels.integrations.liger import LinearScaledCrossEntropy
from tests.which_ran import ALL, HEAD, LOSS, SELECTION, WhichRan

T, D, V = 12, 16, 40
B = 3


@pytest.fixture
def ran(monkeypatch):
    return WhichRan(monkeypatch)


def problem(device):
    hidden = torch.randn(T, D, device=device).requires_grad_()
    weight = torch.randn(V, D, device=device).requires_grad_()
    return ek.Head(hidden, weight, torch.randint(V, (T,), device=device))


def entropies(device):
    return torch.rand(B, T // B, device=device)


def policy_loss(device, impl, **options):
    head = problem(device)
    old = torch.full((T,), -3.0, device=device)
    mask = torch.ones(T, dtype=torch.bool, device=device)
    given = head, old, torch.randn(T, device=device), mask
    loss, _ = ek.high_entropy_policy_loss(*given, backend=ek.Backend(impl), **options)
    loss.backward()
    return mask


def known(device, impl):
    policy_loss(device, impl, selected=torch.arange(T, device=device) < 5)


def of_threshold(device, impl):
    policy_loss(device, impl, threshold=1.0)


def of_sequences(device, impl):
    """The sort of a sequence is plain PyTorch, whatever computes the rest."""
    lengths = torch.full((B,), T // B, device=device)
    policy_loss(device, impl, selection=ek.Selection(scope="sequence"), lengths=lengths)


def without_kernel(device, impl):
    """So are the losses other than the clipped ratio."""
    policy_loss(device, impl, loss_type="cispo")


def module(device, impl):
    head, mask = problem(device), torch.ones(T, dtype=torch.bool, device=device)
    loss, _ = ek.HighEntropyPolicyLoss(backend=ek.Backend(impl))(head, None, mask.float(), mask)
    loss.backward()


def of_ratios(device, impl):
    logprob = (-torch.rand(B, 4, device=device)).requires_grad_()
    mask = torch.ones(B, 4, dtype=torch.bool, device=device)
    ek.ratio_loss(logprob, None, logprob.detach(), mask, impl=impl)[0].backward()


def head_alone(device, impl):
    ek.linear_logprob_entropy(problem(device), impl=impl).entropy.sum().backward()


def liger(device, impl, **options):
    head = problem(device)
    given = head.hidden, head.weight, head.target
    found = LinearScaledCrossEntropy.apply(*given, return_entropy=True, impl=impl, **options)
    sum(x.sum() for x in found).backward()


def liger_of_tokens(device, impl):
    liger(device, impl, selected_token_ids=torch.tensor([0, 7], device=device))


def streaming(device, impl, mode="exact"):
    step = ek.StreamingThreshold(mode=mode, impl=impl)
    step.update(entropies(device))
    step.denominator()


CALLS = {
    "high_entropy_policy_loss": (policy_loss, ALL),
    "high_entropy_policy_loss(selected=)": (known, HEAD | LOSS),
    "high_entropy_policy_loss(threshold=)": (of_threshold, HEAD | LOSS),
    "high_entropy_policy_loss of sequences": (of_sequences, HEAD | LOSS),
    "high_entropy_policy_loss without a kernel": (without_kernel, HEAD | SELECTION),
    "HighEntropyPolicyLoss": (module, ALL),
    "ratio_loss": (of_ratios, LOSS),
    "linear_logprob_entropy": (head_alone, HEAD),
    "LinearScaledCrossEntropy": (liger, HEAD),
    "LinearScaledCrossEntropy of tokens": (liger_of_tokens, HEAD),
    "entropy_threshold": (lambda d, i: ek.entropy_threshold(entropies(d), impl=i), SELECTION),
    "top_entropy_mask": (lambda d, i: ek.top_entropy_mask(entropies(d), impl=i), SELECTION),
    "StreamingThreshold": (streaming, SELECTION),
    "a sketch": (lambda d, i: streaming(d, i, "sketch"), SELECTION),
}


# The interpreter computes rows beyond the last, which are left out of what is stored.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("name", CALLS)
def test_the_named_backend_runs(name, impl, device, ran):
    call, what = CALLS[name]
    call(device, impl)
    ran.assert_only(impl, what)


def test_beside_the_reference_the_rest_is_torch(ran):
    policy_loss("cpu", "reference")
    ran.assert_only("torch", SELECTION | LOSS)


def test_a_selection_is_the_same_on_every_backend(impl, device):
    entropy = (torch.rand(B, 50, device=device) * 8).round() / 8
    for ties in ("exact", "threshold"):
        got = ek.top_entropy_mask(entropy, ties=ties, impl=impl)
        assert torch.equal(got, ek.top_entropy_mask(entropy, ties=ties, impl="torch"))


def test_what_cannot_run_where_the_tokens_are_is_refused(monkeypatch):
    monkeypatch.setattr(backends.device, "interpreting", lambda: False)
    entropy, step = entropies("cpu"), ek.StreamingThreshold(impl="triton")
    for call in (
        lambda: ek.entropy_threshold(entropy, impl="triton"),
        lambda: ek.top_entropy_mask(entropy, impl="triton"),
        lambda: step.update(entropy),
        lambda: policy_loss("cpu", "triton"),
        lambda: liger_of_tokens("cpu", "triton"),
    ):
        with pytest.raises(ValueError, match='impl="triton" cannot run: Triton'):
            call()
    assert int(step.count) == 0


def test_options_without_a_kernel_are_refused_by_name(impl, device):
    if impl == "torch":
        ek.top_entropy_mask(entropies(device), scope="sequence", impl=impl)
        return
    with pytest.raises(
        ValueError, match=f'scope="sequence" .*impl "auto" or "torch"; got .*{impl}'
    ):
        ek.top_entropy_mask(entropies(device), scope="sequence", impl=impl)
