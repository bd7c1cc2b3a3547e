"""`support` as it is called: made, cast, compiled, and with bad input.

T tokens, D hidden, V vocabulary.
"""

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.utils.checkpoint import checkpoint

import entropy_kernels as ek
from entropy_kernels import _rows
from tests.head_cases import logprob_entropy, numbers
from tests.marks import nan_is_meant, sampled
from tests.support_cases import make_sets, masked, random_sets, unsorted

pytestmark = sampled(0.2)

T, D, V = 9, 8, 67
SETS = st.lists(st.lists(st.integers(0, 30), unique=True, max_size=9), max_size=9)


@given(SETS, st.randoms(use_true_random=False))
def test_a_support_is_a_list_of_sets(sets, random):
    support = ek.Support.of(sets)
    numbers = random.choices(range(len(sets)), k=5) if sets else []
    some = support.at(torch.tensor(numbers, dtype=torch.int64)).to("cpu")
    for found, wanted in ((support, sets), (some, [sets[n] for n in numbers])):
        assert found.sizes.tolist() == [len(ids) for ids in wanted]
        ends = found.offsets.tolist()
        ids = found.token_ids.tolist()
        assert [ids[a:b] for a, b in itertools.pairwise(ends)] == wanted
    kept = torch.zeros(len(sets), 31, dtype=torch.bool)
    for row, ids in zip(kept, sets, strict=True):
        row[ids] = True
    of_mask = ek.Support.from_mask(kept)
    wanted = ek.Support.of([sorted(ids) for ids in sets])
    of_batch = ek.Support.from_mask(kept.unflatten(0, (1, -1)) if sets else kept)
    for found in (of_mask, of_batch):
        assert torch.equal(found.token_ids, wanted.token_ids)
        assert torch.equal(found.offsets, wanted.offsets)


def test_sets_of_another_form_are_refused(unchecked_shapes):
    with pytest.raises(ValueError, match="all sequences' tokens in one list; got a list in"):
        ek.Support.of([[], [[3, 4], [5]]])
    for wrong in (1.5, True, "a"):
        with pytest.raises(ValueError, match=f"got {wrong!r} in place of an id"):
            ek.Support.of([[2], [4, wrong]])
    with pytest.raises(ValueError, match="got 3 in place of a list"):
        ek.Support.of([3])
    with pytest.raises(ValueError, match=r"kept must be a bool tensor; got .*int64"):
        ek.Support.from_mask(torch.tensor([[2, 0]]))
    with pytest.raises(ValueError, match=r"kept must be \[T, V\] or \[B, L, V\]; got \(2,\)"):
        ek.Support.from_mask(torch.tensor([True, False]))


@settings(max_examples=30)
@given(st.data())
def test_any_sets_in_any_order_are_those_of_masked_logits(data):
    sets = data.draw(st.lists(st.lists(st.integers(0, 12), unique=True, min_size=1), min_size=1))
    ids = [data.draw(st.permutations(each)) for each in sets]
    y = torch.tensor([data.draw(st.sampled_from(each)) for each in sets])
    ignored = torch.tensor([data.draw(st.booleans()) for _ in sets])
    y = torch.where(ignored, -100, y)
    generator = torch.Generator().manual_seed(len(sets))
    h, w = (torch.randn(n, 3, generator=generator) for n in (len(sets), 13))
    kept = torch.zeros(len(sets), 13, dtype=torch.bool)
    for row, each in zip(kept, sets, strict=True):
        row[each] = True
    leaves = [x.requires_grad_() for x in (h, w)]
    found = logprob_entropy(*leaves, y, support=ek.Support.of(ids))
    want = masked(torch.float64, *leaves, y, kept)
    for got, wanted in zip(found[:2], want, strict=False):
        torch.testing.assert_close(got, wanted.float(), rtol=1e-5, atol=1e-6)
        grads = [torch.autograd.grad(x.sum(), leaves, retain_graph=True) for x in (got, wanted)]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


def sets(change):
    """The sets that `change` makes of lists of ids, and of their targets."""

    def changed(kept, y):
        support = unsorted(kept)
        ends = support.offsets.tolist()
        ids = support.token_ids.tolist()
        found = [ids[a:b] for a, b in itertools.pairwise(ends)]
        change(found, int(y[2]))
        return ek.Support.of(found)

    return changed


def fields(change):
    """The support whose two fields `change` makes of the right ones."""
    return lambda kept, y: ek.Support(*change(unsorted(kept).token_ids, unsorted(kept).offsets))


def replaced(x, place, value):
    x = x.clone()
    x[place] = value
    return x


BAD = {
    "not a support": (lambda kept, y: kept, {}, r"a Support or None; got torch.bool \(9, 67\)"),
    "a list": (fields(lambda ids, ends: (ids.tolist(), ends)), {}, "token_ids must be a tensor"),
    "dtype": (
        fields(lambda ids, ends: (ids.float(), ends)),
        {},
        "int64 or int32; got torch.float32",
    ),
    "rank": (
        fields(lambda ids, ends: (ids[None], ends)),
        {},
        r"token_ids must be \[N\]; got \(1, ",
    ),
    "device": (
        fields(lambda ids, ends: (ids, ends.to("meta"))),
        {},
        "on cpu, like hidden; got meta",
    ),
    "tokens": (fields(lambda ids, ends: (ids, ends[1:])), {}, r"\[10\], one more .*; got \(9,\)"),
    "first offset": (
        fields(lambda ids, ends: (ids, replaced(ends, 0, 1))),
        {},
        r"offsets must rise from 0 to \d+, the number of token_ids; got 1 to",
    ),
    "last offset": (fields(lambda ids, ends: (ids[1:], ends)), {}, "offsets must rise from 0 to"),
    "falling": (
        fields(lambda ids, ends: (ids, replaced(ends, 3, int(ends[4]) + 1))),
        {},
        "falling in between",
    ),
    "too large": (
        sets(lambda found, y: found[2].append(67)),
        {},
        r"token_ids must lie in \[0, 67\); got 67 in the set of token 2",
    ),
    "negative": (sets(lambda found, y: found[2].append(-1)), {}, "got -1 in the set of token 2"),
    "twice": (
        sets(lambda found, y: found[2].append(y)),
        {},
        r"not repeat an id in a set; got \d+ twice in the set of token 2",
    ),
    "twice in order": (
        lambda kept, y: ek.Support(y.repeat_interleave(2), 2 * torch.arange(T + 1)),
        {},
        r"not repeat an id in a set; got \d+ twice in the set of token 0",
    ),
    "without its target": (
        sets(lambda found, y: found[2].remove(y)),
        {},
        r"target of each token must be in its set; got target \d+ at token 2, whose set of \d+ ids",
    ),
    "empty": (sets(lambda found, y: found[2].clear()), {}, "at token 2, whose set of 0 ids"),
    "keep_logits": (
        lambda kept, y: unsorted(kept),
        {"keep_logits": True},
        "no meaning with a supp",
    ),
    "keep_logits_above": (
        lambda kept, y: unsorted(kept),
        {"keep_logits_above": 0.5},
        "no meaning with a support",
    ),
}


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize(("change", "options", "message"), BAD.values(), ids=BAD)
def test_bad_sets_say_what_came_and_what_was_wanted(
    change, options, message, impl, unchecked_shapes
):
    (h, w, y), kept = make_sets("peaked", (T, D, V), torch.float32)
    kept[2, :3] = True
    with pytest.raises(ValueError, match=message):
        logprob_entropy(h, w, y, support=change(kept, y), impl=impl, **options)


def test_pairs_without_a_token_are_refused():
    given = ek.Support(torch.tensor([3]), torch.tensor([0]))
    none = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="token_ids must be empty without tokens; got 1"):
        logprob_entropy(torch.zeros(0, 2), torch.zeros(5, 2), none, support=given)


UNCHECKED = {
    "too large": sets(lambda found, y: found[2].append(67)),
    "negative": sets(lambda found, y: found[2].append(-1)),
    "twice": sets(lambda found, y: found[2].append(y)),
    "without its target": sets(lambda found, y: found[2].remove(y)),
    "another alone": sets(lambda found, y: found.__setitem__(2, [(y + 1) % V])),
    "too large alone": sets(lambda found, y: found.__setitem__(2, [V])),
    "empty": sets(lambda found, y: found[2].clear()),
}


@nan_is_meant
@pytest.mark.parametrize("output", ["logprob", "entropy"])
@pytest.mark.parametrize("wrong", UNCHECKED)
def test_what_nobody_checks_is_nan_in_its_row_alone(impl, device, wrong, output, monkeypatch):
    if impl == "cpu":
        impl = "torch"  # The compiled kernels never run where nothing is checked.
    monkeypatch.setattr(_rows, "sees_values", lambda device: False)
    (h, w, y), kept = make_sets("peaked", (T, D, V), torch.float32, device)
    kept[2, :3] = True
    support = UNCHECKED[wrong](kept, y).to(device)
    h, w = h.requires_grad_(), w.requires_grad_()
    found = logprob_entropy(h, w, y, support=support, statistics=_rows.OF_SETS, impl=impl)
    for x in numbers(found):
        assert x.isnan().nonzero().flatten().tolist() == [2]
    getattr(found, output).sum().backward()
    assert h.grad.isnan().any(1).nonzero().flatten().tolist() == [2]


@nan_is_meant
def test_a_bound_that_nobody_checks_is_nan_beyond_it_alone(monkeypatch):
    monkeypatch.setattr(_rows, "sees_values", lambda device: False)
    h, w, y = torch.randn(T, D, requires_grad=True), torch.randn(V, D), torch.arange(T)
    everything = ek.Support.from_mask(torch.ones(T, V, dtype=torch.bool))
    for most, broken in ((T, False), (T - 1, True)):
        found = logprob_entropy(h, w, y, support=everything, max_active_rows=most, impl="torch")
        (slope,) = torch.autograd.grad(found.entropy.sum(), h)
        assert bool(slope.isnan().any()) == broken


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("place", [0, 4, -1])
def test_offsets_that_nobody_checks_lead_out_of_no_memory(impl, device, place, monkeypatch):
    impl = "torch" if impl == "cpu" else impl
    monkeypatch.setattr(_rows, "sees_values", lambda device: False)
    (h, w, y), kept = make_sets("peaked", (T, D, V), torch.float32, device)
    support = unsorted(kept)
    wrong = ek.Support(support.token_ids, replaced(support.offsets, place, 1 << 40))
    found = logprob_entropy(h, w, y, support=wrong, impl=impl)
    assert found.logprob.isnan().all()
    assert found.entropy.isnan().all()


def test_autocast_casts_as_linear_does_and_stays_fp32_inside(head, device):
    (h, w, y), kept = make_sets("peaked", (T, D, V), torch.float32, device)
    h, w = h.requires_grad_(), w.requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        found = head(h, w, y, support=unsorted(kept))
        (found.logprob + found.entropy).sum().backward()
    want = head(h.bfloat16(), w.bfloat16(), y, support=unsorted(kept))
    assert torch.equal(found.logprob, want.logprob)
    assert torch.equal(found.entropy, want.entropy)
    assert h.grad.dtype == w.grad.dtype == torch.float32


# Where a graph ends dynamo looks at the gradients of what it hands on.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_step_runs_around_it(head, dynamic, device, unchecked_shapes):
    (h, w, y), kept = make_sets("peaked", (T, D, V), torch.float32, device)
    support = unsorted(kept)

    def step(h, w, support):
        found = head(2 * h, w, y, temperature=0.7, support=support)
        return (found.logprob - 0.1 * found.entropy).sum()

    torch.compiler.reset()
    results = []
    for function in (step, torch.compile(step, dynamic=dynamic, backend="aot_eager")):
        x, weight = h.clone().requires_grad_(), w.clone().requires_grad_()
        loss = function(x, weight, support)
        loss.backward()
        results.append((loss, x.grad, weight.grad))
    for eager, got in zip(*results, strict=True):
        torch.testing.assert_close(got, eager, rtol=1e-6, atol=1e-7)


def test_a_checkpoint_runs_it_again(head, device):
    (h, w, y), kept = make_sets("peaked", (T, D, V), torch.float32, device)
    results = []
    for again in (False, True):
        x, weight = h.clone().requires_grad_(), w.clone().requires_grad_()

        def loss(x, weight):
            found = head(x, weight, y, support=unsorted(kept))
            return (found.logprob + found.entropy).sum()

        value = checkpoint(loss, x, weight, use_reentrant=False) if again else loss(x, weight)
        value.backward()
        results.append((value, x.grad, weight.grad))
    assert all(map(torch.equal, *results))


def test_second_derivatives_are_refused(head, device):
    (h, w, y), kept = make_sets("peaked", (T, D, V), torch.float32, device)
    h.requires_grad_(), w.requires_grad_()

    def loss(h):
        return head(h, w, y, support=unsorted(kept)).entropy.square().sum()

    (slope,) = torch.autograd.grad(loss(h), h, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(loss)(h.detach())


def test_nothing_is_kept_without_gradients(head, device):
    (h, w, y), kept = make_sets("peaked", (T, D, V), torch.float32, device)
    want = head(h, w, y, support=unsorted(kept))
    h.requires_grad_(), w.requires_grad_()
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            found = head(h, w, y, support=unsorted(kept))
        assert not found.logprob.requires_grad
        assert torch.equal(found.logprob, want.logprob)


def test_the_seeds_of_random_sets_hold_every_kind():
    kept = random_sets(torch.arange(V), V)
    assert {1, V} < set(kept.sum(1).tolist())
