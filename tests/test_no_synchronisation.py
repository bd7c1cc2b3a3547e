"""Nothing waits for a GPU in forward, loss and backward with a bound, for every loss and option.

What does wait, or copies, is in a list of its own, by name.
"""

import functools
import itertools
import re
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, is_dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

pytest.importorskip("triton")

import entropy_kernels as ek
from entropy_kernels import _triton, distributed, ops, token_rules
from entropy_kernels._radix import kth_largest
from entropy_kernels.top_entropy_mask import SCOPES, TIES, WHICH
from tests import cuda_extension
from tests.gpu_options import (
    CALLS,
    CHOICES,
    HEADS,
    IDS,
    LOSSES,
    MOST,
    SETS,
    B,
    D,
    L,
    Options,
    T,
    V,
    bools,
    floats,
    head_alone,
    make_head,
    policy_loss,
)
from tests.host_waits import HostWaits, backward, fake_gpu
from tests.interpreter_sanitizer import kernels_of

IMPLS = ("triton", "cuda", "torch")


@pytest.fixture(autouse=True)
def extension(monkeypatch):
    """The CUDA kernels, of which nothing is built here. What they lack falls to Triton's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", 'impl="cuda" takes a Triton kernel', RuntimeWarning)
        yield cuda_extension.install(monkeypatch, cuda_extension.Extension())


def count(run: Callable[[], object]) -> dict[str, int]:
    """What waits or copies within `run` on the fake GPU, which ends where a value is needed."""
    with HostWaits() as waits, suppress(DataDependentOutputException, DynamicOutputShapeException):
        run()
    return dict(waits.found)


def ratio_loss(options: Options, *shape: int) -> None:
    logprob = floats(*shape).requires_grad_()
    tokens = {"old_logprob": floats(*shape), "advantage": floats(*shape), "mask": bools(*shape)}
    loss, _ = ek.ratio_loss(logprob, **tokens | options)
    backward(loss)


def selected_beyond_the_tokens() -> None:
    backend = ek.Backend("triton", max_active_rows=T + 1)
    policy_loss("triton", {"selected": bools(B, L), "backend": backend})


def selection(impl: str) -> None:
    """Every launch of the threshold and of the mask."""
    kth = kth_largest([(floats(T), bools(T)), (floats(T), None)], 0.2, None, impl)
    ops.select_largest(floats(T), bools(T), kth.value, kth.quota, impl)


def top_of(scope: str, which: str, ties: str) -> None:
    ek.top_entropy_mask(floats(B, L), bools(B, L), scope=scope, which=which, ties=ties)


def streaming(mode: str, **options: Any) -> ek.StreamingThreshold:
    threshold = ek.StreamingThreshold(mode=mode, **options)
    threshold.update(floats(B, L), bools(B, L))
    threshold.update(floats(B, L))
    return threshold


def stream(mode: str) -> None:
    threshold = streaming(mode)
    threshold.mask(floats(B, L), bools(B, L))
    _ = threshold.count, threshold.value(), threshold.selected_count(), threshold.denominator()
    other = ek.StreamingThreshold(mode=mode)
    state = {"mode": mode, "fraction": 0.2}
    if mode == "sketch":
        state = threshold.state_dict()
    else:
        state["entropies"] = floats(T)
    other.load_state_dict(state)
    threshold.reset()
    threshold.value()


def steps_of_one_mean() -> None:
    """Counts of a step before it, and its metrics after it."""
    masks = [bools(B, L), bools(B, L)]
    loss, metrics = ek.ratio_loss(
        floats(B, L).requires_grad_(),
        None,
        floats(B),
        masks[0],
        denominator=distributed.mean_count(masks),
    )
    distributed.join_metrics([metrics | {"loss": loss.detach()}] * 2)


# What is no loss: the selection, and rules that pick tokens.
RULES: dict[str, Callable[[], object]] = {
    "selection triton": lambda: selection("triton"),
    "selection cuda": lambda: selection("cuda"),
    "selection torch": lambda: selection("torch"),
    **{
        " ".join(choice): functools.partial(top_of, *choice)
        for choice in itertools.product(SCOPES, WHICH, TIES)
    },
    "selected with a bound beyond T": selected_beyond_the_tokens,
    "entropy_threshold": lambda: ek.entropy_threshold(floats(B, L), bools(B, L)),
    "streaming exact": lambda: stream("exact"),
    "streaming sketch": lambda: stream("sketch"),
    "counts and metrics of a step": steps_of_one_mean,
    "covariance": lambda: token_rules.covariance(floats(B, L), floats(B), bools(B, L)),
    "clip_cov": lambda: token_rules.clip_cov(
        floats(B, L), floats(B), bools(B, L), clipped=bools(B, L)
    ),
    "kl_cov": lambda: token_rules.kl_cov(floats(B, L), floats(B), bools(B, L)),
    "entropy_advantage": lambda: token_rules.entropy_advantage(floats(B), floats(B, L)),
    "two_clip_ranges": lambda: token_rules.two_clip_ranges(bools(B, L)),
    "select_token": lambda: token_rules.select_token(*[floats(B, L)] * 3, bools(B, L)),
    "discriminator": lambda: token_rules.discriminator(floats(B, L), floats(B, L)),
    "expected_discriminator": lambda: token_rules.expected_discriminator(*[floats(B, L)] * 3),
    "clip_discriminator": lambda: token_rules.clip_discriminator(
        floats(B, L), floats(B), bools(B, L), centre=floats(B, L)
    ),
    "gradient_magnitude": lambda: token_rules.gradient_magnitude(*[floats(B, L)] * 4),
    "silenced": lambda: token_rules.silence_spurious(*[floats(B, L)] * 3, bools(B, L), floats()),
    "surprisal_band": lambda: token_rules.surprisal_band(*[floats(B, L)] * 2, bools(B, L)),
    "random_tokens": lambda: token_rules.random_tokens(bools(B, L)),
    "random_prefixes": lambda: token_rules.random_prefixes(bools(B, L)),
    "lengths on the GPU, a loss of tokens": lambda: ratio_loss(
        {"lengths": lengths("cuda"), "advantage": floats(B)}, T
    ),
    "one length per token": lambda: ratio_loss({"lengths": lengths("cuda")}, B),
}


def lengths(device: str) -> Tensor:
    # The fake CPU keeps the values of a list.
    on_gpu = device == "cuda"
    return torch.full((B,), L, device="cuda") if on_gpu else torch.tensor([L] * B)


def of_sequences(device: str) -> Options:
    return {"lengths": lengths(device), "advantage": floats(B), "loss_type": "gspo"}


# What waits, or copies without waiting, as its documentation says.
WAITS: dict[str, tuple[Callable[[], object], set[str]]] = {
    "backward without a bound, triton": (
        lambda: head_alone("triton", {"max_active_rows": None}),
        {"item at launch_rows.py"},
    ),
    "backward without a bound, torch": (
        lambda: head_alone("torch", {"max_active_rows": None}),
        {"nonzero at _rows.py"},
    ),
    "sets, torch": (
        lambda: head_alone("torch", SETS["support"]()),
        {"nonzero at _support_head.py"},
    ),
    "ids per token, torch": (
        lambda: head_alone("torch", IDS["per token"]()),
        {"nonzero at _pair_products.py"},
    ),
    "shared ids without a bound": (
        lambda: head_alone("triton", IDS["shared"]() | {"max_active_rows": None}),
        {"nonzero at _rows.py"},
    ),
    "selected without a bound": (
        lambda: policy_loss("torch", {"selected": bools(B, L), "backend": ek.Backend("torch")}),
        {"nonzero at high_entropy_policy_loss.py"},
    ),
    "values checked by the specification": (
        lambda: head_alone("reference", {}),
        {"item at _rows.py"},
    ),
    "lengths on the GPU, a loss of sequences": (
        lambda: ratio_loss(of_sequences("cuda"), T),
        {"item at _ragged.py"},
    ),
    "lengths on the CPU": (
        lambda: ratio_loss(of_sequences("cpu"), T),
        {"copy, _to_copy at _ragged.py"},
    ),
    "state_dict of entropies": (
        lambda: streaming("exact").state_dict(),
        {"index at streaming_threshold.py"},
    ),
    "a state on the CPU": (
        lambda: ek.StreamingThreshold(device="cuda").load_state_dict(
            {"mode": "exact", "fraction": 0.2, "entropies": torch.ones(3)}
        ),
        {"_to_copy at streaming_threshold.py"},
    ),
}


def test_every_option_is_tried():
    with fake_gpu():
        heads, calls = ([x() for x in table.values()] for table in (HEADS, CALLS | SETS | IDS))
        of_loss = [x() for x in (LOSSES | CHOICES).values()]
    tried = {name for options in (*heads, *calls, *of_loss) for name in options}
    groups = [x for options in of_loss for x in options.values() if is_dataclass(x)]
    tried |= {f.name for x in groups for f in fields(x) if getattr(x, f.name) is not f.default}
    parameters = {*signature(ek.high_entropy_policy_loss).parameters}
    parameters |= {*signature(ek.linear_logprob_entropy).parameters}
    kinds = ek.Head, ek.KL, ek.Correction, ek.Aggregation, ek.EntropyBonus, ek.Selection
    wanted = parameters | {f.name for kind in kinds for f in fields(kind)}
    # Those below have tests of their own, or are in every case.
    elsewhere = {"backend", "hidden", "impl", "lengths", "main_grad", "parallel", "vocab_group"}
    assert wanted - tried == elsewhere | {"head", "mask", "target", "weight"}


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_waits(name):
    with fake_gpu() as launches:
        options = {"threshold": floats()} | LOSSES[name]()
        assert count(lambda: policy_loss("triton", options)) == {}
        assert launches


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CHOICES)
def test_no_choice_of_tokens_waits(name, impl, extension):
    with fake_gpu() as launches:
        options = CHOICES[name]()
        assert count(lambda: policy_loss(impl, options)) == {}
        assert bool(launches) == (impl != "torch")
        assert bool(extension.launched) == (impl == "cuda")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", HEADS)
def test_no_head_waits(name, impl):
    with fake_gpu():
        of_head = HEADS[name]()
        assert count(lambda: head_alone(impl, {}, **of_head)) == {}


def test_no_launcher_of_any_kernel_waits_on_any_architecture():
    launched = Counter()
    for arch in ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942"):
        with fake_gpu(arch) as launches, HostWaits() as waits:
            for options, size in itertools.product(CALLS.values(), (D, 1024, 4096)):
                head_alone("triton", options(), size=size)
            for options in (SETS | IDS).values():
                head_alone("triton", options())
            ek.entropy_from_logits(floats(T, V), impl="triton")
            selection("triton")
            ratio_loss({"impl": "triton", "dual_clip": 3.0}, T)
        assert waits.found == {}
        launched += launches
    assert launched.keys() == kernels_of(Path(_triton.__file__).parent)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CALLS)
def test_no_option_of_the_head_waits(name, impl):
    with fake_gpu():
        options = CALLS[name]()
        assert count(lambda: head_alone(impl, options)) == {}


@pytest.mark.parametrize("impl", ["triton", "cuda"])
@pytest.mark.parametrize("name", IDS)
def test_no_log_probs_of_chosen_ids_wait(name, impl):
    with fake_gpu():
        assert count(lambda: head_alone(impl, IDS[name]())) == {}
        of_head = {"bias": floats(V, dtype=torch.bfloat16).requires_grad_(), "softcap": 30.0}
        assert count(lambda: head_alone(impl, IDS[name](), **of_head)) == {}


@pytest.mark.parametrize("impl", ["triton", "cuda"])
@pytest.mark.parametrize("name", SETS)
def test_no_head_over_sets_waits(name, impl):
    with fake_gpu():
        options = SETS[name]()
        assert count(lambda: head_alone(impl, options)) == {}
        policy = {"fraction": 0.5, "support": options["support"]}
        assert count(lambda: policy_loss(impl, policy)) == {}


@pytest.mark.parametrize("impl", IMPLS)
def test_no_weights_gradient_into_a_buffer_waits(impl):
    with fake_gpu():
        for dtype in (torch.float32, torch.bfloat16):
            backend = ek.Backend(impl, floats(V, D, dtype=dtype), MOST)
            assert count(lambda backend=backend: policy_loss(impl, {"backend": backend})) == {}


def test_the_module_does_not_wait():
    with fake_gpu():
        module = ek.nn.HighEntropyPolicyLoss(backend=ek.Backend("triton"))
        tokens = make_head(B, L), floats(B, L), floats(B), bools(B, L)
        assert count(lambda: backward(module(*tokens, max_active_rows=MOST)[0])) == {}


@pytest.mark.parametrize("name", RULES)
def test_no_rule_waits(name):
    with fake_gpu():
        assert count(RULES[name]) == {}


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_or_copies_is_listed_by_name(name):
    """By these the detector is seen to see."""
    run, expected = WAITS[name]
    with fake_gpu():
        assert {re.sub(r":\d+$", "", key) for key in count(run)} == expected
