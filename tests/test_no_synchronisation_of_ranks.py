"""No collective of a loss or a selection makes the host wait for a GPU."""

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

pytest.importorskip("triton")

import entropy_kernels as ek
from entropy_kernels import distributed
from tests.gpu_options import B, L, T, bools, floats, policy_loss
from tests.host_waits import fake_gpu
from tests.test_no_synchronisation import IMPLS, count, extension, streaming  # noqa: F401


@pytest.fixture
def two_ranks():
    """A group of two ranks, of which this process is one and the other does nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "gspo"])
def test_no_collective_of_a_loss_waits(loss_type, two_ranks):
    with fake_gpu():
        for name in ("group", "sequence_group", "vocab_group"):
            for impl in IMPLS:
                options = {"loss_type": loss_type, "parallel": ek.Parallel(**{name: two_ranks})}
                assert count(lambda: policy_loss(impl, options)) == {}  # noqa: B023


def test_no_collective_of_a_selection_waits(two_ranks):
    with fake_gpu():
        for mode in ("exact", "sketch"):
            threshold = streaming(mode, group=two_ranks)
            assert count(threshold.denominator) == {}
        assert count(lambda: distributed.mean_count(bools(B, L), two_ranks)) == {}
        assert count(lambda: ek.top_entropy_mask(floats(T), group=two_ranks)) == {}
