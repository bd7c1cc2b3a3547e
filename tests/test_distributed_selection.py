"""Selection over ranks: what each selects together is what one process selects of all tokens."""

import pytest
import torch
import torch.distributed as dist

from entropy_kernels import StreamingThreshold, distributed, entropy_threshold, top_entropy_mask
from tests.marks import sampled
from tests.processes import meeting, results_by_rank, save_by_groups, spawn

pytestmark = sampled(0.2)

# Tokens of each rank: one of them has none.
SHARES = {2: [900, 0], 3: [301, 0, 700]}
KINDS = ["distinct", "tied", "masked"]
OPTIONS = [
    {"which": which, "ties": ties}
    for which in ("top", "bottom", "random")
    for ties in ("exact", "threshold")
]
FRACTION = 0.2
HISTOGRAMS = [2048, 2048, 1024]


def tokens_of(kind, total):
    generator = torch.Generator().manual_seed(1)
    entropy = torch.empty(total).exponential_(generator=generator)
    if kind == "tied":
        entropy = (4 * entropy).floor()
    mask = torch.rand(total, generator=generator) < (0.0 if kind == "masked" else 0.7)
    return entropy, mask


def select(entropy, mask, group):
    """Everything under test, on the tokens of one rank."""
    results = {"threshold": entropy_threshold(entropy, mask, FRACTION, group=group)}
    for options in OPTIONS:
        keep = top_entropy_mask(entropy, mask, FRACTION, group=group, **options)
        results["-".join(options.values())] = keep
    for mode in ("exact", "sketch"):
        streaming = StreamingThreshold(FRACTION, mode=mode, group=group)
        for part in range(2 if len(entropy) else 0):
            streaming.update(entropy[part::2], mask[part::2])
        results[mode] = streaming.value()
        results[f"{mode}, kept"] = streaming.selected_count()
        results[f"{mode}, denominators"] = streaming.denominator(), streaming.denominator("all")
        results[f"{mode}, mask"] = streaming.mask(entropy, mask)
    results["count"] = distributed.global_count(mask, group)
    return results


def record_moved(call):
    """The elements of each tensor that `call` sums over the ranks."""
    moved = []
    all_reduce = dist.all_reduce

    def recorded(tensor, **options):
        moved.append(tensor.numel())
        return all_reduce(tensor, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", recorded)
        call()
    return moved


def results_of(group, size):
    """What one rank of `group` selects of its share, and what moved meanwhile."""
    rank, shares, results = dist.get_rank(group), SHARES[size], {}
    for kind in KINDS:
        parts = [x.split(shares)[rank] for x in tokens_of(kind, sum(shares))]
        results[kind] = select(*parts, group)
    results["moved"] = {
        "threshold": record_moved(lambda: entropy_threshold(*parts, group=group)),
        "mask": record_moved(lambda: top_entropy_mask(*parts, group=group)),
        "indicator": record_moved(lambda: top_entropy_mask(*parts, ties="threshold", group=group)),
    }
    held = torch.tensor(shares[rank])
    results["offset"] = distributed.rank_offset(held, group)
    results["sum"] = distributed.all_reduce_sum(held, group)
    results["held"] = held
    return results


def work(rank, folder):
    """One of three processes: a group of all, and one of the first two."""
    torch.manual_seed(rank)
    with meeting(rank, folder, ranks=3):
        save_by_groups(rank, folder, SHARES, results_of)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    spawn(work, (folder,), nprocs=3)
    return folder


@pytest.fixture(params=SHARES, ids="{}-ranks".format)
def ranks(request, folder):
    return results_by_rank(folder, request.param)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["top", "bottom"])
@pytest.mark.parametrize("ties", ["exact", "threshold"])
def test_masks_join_to_that_of_one_process(ranks, kind, which, ties):
    entropy, mask = tokens_of(kind, sum(SHARES[len(ranks)]))
    joined = torch.cat([rank[kind][f"{which}-{ties}"] for rank in ranks])
    assert torch.equal(joined, top_entropy_mask(entropy, mask, FRACTION, which=which, ties=ties))


@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_has_the_threshold_of_one_process(ranks, kind):
    one = select(*tokens_of(kind, sum(SHARES[len(ranks)])), None)
    for rank in ranks:
        for name in ("threshold", "exact", "sketch", "count"):
            assert torch.equal(rank[kind][name], one[name]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["exact", "sketch"])
def test_counts_of_the_step_are_those_of_all_ranks(ranks, kind, mode):
    kept = sum(rank[kind][f"{mode}, mask"].sum() for rank in ranks)
    valid = tokens_of(kind, sum(SHARES[len(ranks)]))[1].sum()
    if kind == "tied":
        assert kept > -(-valid // 5)
    for rank in ranks:
        assert rank[kind][f"{mode}, kept"] == kept
        means = torch.stack(rank[kind][f"{mode}, denominators"])
        assert torch.equal(means, torch.stack([kept, valid]).double() / len(ranks))


@pytest.mark.parametrize("kind", KINDS)
def test_random_selects_the_global_count(ranks, kind):
    _, mask = tokens_of(kind, sum(SHARES[len(ranks)]))
    joined = torch.cat([rank[kind]["random-exact"] for rank in ranks])
    assert joined.sum() == -(-mask.sum() // 5)
    assert not (joined & ~mask).any()


def test_only_histograms_and_counts_move(ranks):
    for rank in ranks:
        assert rank["moved"] == {
            "threshold": HISTOGRAMS,
            "mask": [*HISTOGRAMS, len(ranks)],
            "indicator": HISTOGRAMS,
        }


def test_offsets_and_sums_of_counts(ranks):
    shares = SHARES[len(ranks)]
    for i, rank in enumerate(ranks):
        assert rank["offset"] == sum(shares[:i])
        assert rank["sum"] == sum(shares)
        assert rank["held"] == shares[i]


def test_one_process_needs_no_group():
    count = torch.tensor(3)
    assert distributed.all_reduce_sum(count, None) is count
    assert distributed.rank_offset(count, None) == 0
    assert distributed.global_count(torch.tensor([[True, False], [True, True]])) == 3
