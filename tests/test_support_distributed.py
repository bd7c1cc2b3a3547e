"""`support` with the weight's rows on two ranks: what one rank with all of them finds.

T tokens, D hidden, V vocabulary.
"""

import pytest
import torch
import torch.distributed as dist

import entropy_kernels as ek
from entropy_kernels._rows import OF_SETS
from entropy_kernels.testing import Watch
from tests.processes import meeting, results_by_rank, save_by_groups, spawn
from tests.support_cases import make_sets, unsorted
from tests.vocab_parallel_cases import MISSING, mine, moved_by

T, D, V = 33, 16, 101
SHARES = {"even": [50, 51], "one row": [100, 1], "no row": [0, 101]}
CASES = {
    "fp32": (torch.float32, {}),
    "bf16": (torch.bfloat16, {}),
    "options": (torch.float32, {"softcap": 5.0, "logit_scale": 1.5, "temperature": 0.7}),
    "bounded": (torch.float32, {"max_active_rows": 30}),
}
IMPLS = {"torch": None} | {name: why for name, why in MISSING.items() if name == "cpu"}
PARAMS = [
    pytest.param(
        *(impl, case, shares),
        marks=pytest.mark.skipif(why is not None, reason=why or "here"),
        id=f"{impl}-{case}-{shares}",
    )
    for impl, why in IMPLS.items()
    for case, shares in [*((x, "even") for x in CASES), ("fp32", "one row"), ("fp32", "no row")]
]


def inputs_of(case):
    (h, w, y), kept = make_sets("peaked", (T, D, V), CASES[case][0])
    y[::5] = -100
    kept[::10] = False
    bias = torch.randn(V, generator=torch.Generator().manual_seed(1)).to(h.dtype)
    return h, w, y, bias, unsorted(kept)


def results(impl, case, group, shares):
    """Outputs, statistics, hidden's gradient, and those of this rank's weight and bias."""
    h, w, y, bias, support = inputs_of(case)
    options = dict(CASES[case][1])
    most = options.pop("max_active_rows", None)
    if group is not None:
        w, bias = (mine(x, shares, group).clone() for x in (w, bias))
    leaves = [x.requires_grad_() for x in (h, w, bias)]
    found = ek.linear_logprob_entropy(
        ek.Head(h, w, y, bias, **options),
        support=support,
        vocab_group=group,
        max_active_rows=most,
        statistics=OF_SETS,
        impl=impl,
    )
    generator = torch.Generator().manual_seed(2)
    some = torch.rand(T, generator=generator) < 0.6
    slopes = [torch.randn(T, generator=generator) * some for _ in "ab"]
    sum((x * g).sum() for x, g in zip(found[:2], slopes, strict=True)).backward()
    return [x.detach() for x in found if x is not None] + [x.grad for x in leaves]


def losses(group):
    h, w, y, bias, support = inputs_of("fp32")
    mask = torch.arange(T) % 7 != 3
    advantage = torch.randn(T, generator=torch.Generator().manual_seed(3))
    if group is not None:
        w, bias = (mine(x, SHARES["even"], group).clone() for x in (w, bias))
    h, w = h.requires_grad_(), w.requires_grad_()
    main_grad = torch.ones_like(w)
    loss, metrics = ek.high_entropy_policy_loss(
        *(ek.Head(h, w, y, bias), torch.full((T,), -0.1), advantage, mask),
        fraction=0.3,
        support=support,
        parallel=ek.Parallel(vocab_group=group),
        backend=ek.Backend(main_grad=main_grad),
    )
    loss.backward()
    return {"loss": loss.detach(), "metrics": metrics, "h": h.grad, "w": main_grad}


def cost(group):
    """What moves, and this rank's products; the active rows, and the pairs of all ranks."""
    h, w, y, _, support = inputs_of("fp32")
    h, w = h.requires_grad_(), mine(w, SHARES["even"], group).clone().requires_grad_()
    with Watch() as watch:
        forward, found = moved_by(
            lambda: ek.linear_logprob_entropy(
                ek.Head(h, w, y), support=support, vocab_group=group, impl="torch"
            )
        )
        backward, _ = moved_by(found.entropy[:9].sum().backward)
    return {"forward": forward, "backward": backward, "products": watch.products}


def errors(group):
    h, w, y, _, support = inputs_of("fp32")
    w, rank, found = mine(w, SHARES["even"], group), dist.get_rank(group), {}
    fewer = support.at(torch.arange(T - rank))
    for name, given in {
        "tokens": (h[: T - rank], w, y[: T - rank], fewer),
        "sets": (h, w, y, support if rank == 0 else ek.Support.from_mask(torch.ones(T, V) > 0)),
        "target": (h, w, (y + 2 * V).where(y >= 0, y), support),
    }.items():
        with pytest.raises(ValueError, match="got") as error:
            ek.linear_logprob_entropy(ek.Head(*given[:3]), support=given[3], vocab_group=group)
        found[name] = str(error.value)
    return found


def results_of(group, size):
    found = {"losses": losses(group), "cost": cost(group), "errors": errors(group)}
    for param in PARAMS:
        impl, case, shares = param.values
        if IMPLS[impl] is None:
            found[param.id] = results(impl, case, group, SHARES[shares])
    return found


def work(rank, folder):
    with meeting(rank, folder, ranks=2):
        save_by_groups(rank, folder, (2,), results_of)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    spawn(work, (folder,), nprocs=2)
    return results_by_rank(folder, 2)


@pytest.mark.parametrize(("impl", "case", "shares"), PARAMS)
def test_shards_find_what_one_rank_finds(ranks, impl, case, shares):
    first, second = (rank[f"{impl}-{case}-{shares}"] for rank in ranks)
    want = results(impl, case, None, None)
    assert all(map(torch.equal, first[:8], second[:8]))
    # Each logit is one rank's, so that nothing but hidden's gradient is summed in another order.
    assert all(map(torch.equal, first[:7], want[:7]))
    eps = torch.finfo(first[7].dtype).eps
    torch.testing.assert_close(first[7], want[7], rtol=2 * eps, atol=1e-5)
    for own in (8, 9):
        assert torch.equal(torch.cat([first[own], second[own]]), want[own])


def test_the_loss_is_that_of_one_rank(ranks):
    want = losses(None)
    assert want["h"].any()
    for rank in ranks:
        for name in ("loss", "metrics", "h"):
            torch.testing.assert_close(rank["losses"][name], want[name], rtol=1e-5, atol=1e-7)
    assert torch.equal(torch.cat([rank["losses"]["w"] for rank in ranks]), want["w"])


def test_a_logit_moves_per_pair_and_the_gradients_of_active_rows(ranks):
    _, _, y, _, support = inputs_of("fp32")
    live = (y >= 0) & (support.sizes > 1)
    products = D * int((support.sizes * live).sum() + 2 * (support.sizes * live)[:9].sum())
    assert sum(rank["cost"]["products"] for rank in ranks) == products
    for rank in ranks:
        assert rank["cost"]["forward"] == [2 * 3, support.token_ids.numel()]
        assert rank["cost"]["backward"] == [int(live[:9].sum()) * D]


def test_errors_name_what_is_wrong_on_every_rank(ranks):
    for rank in ranks:
        assert "same tokens; got [33, 32]" in rank["errors"]["tokens"]
        assert "same token_ids of sets; got [" in rank["errors"]["sets"]
        assert f"[0, {V})" in rank["errors"]["target"]
