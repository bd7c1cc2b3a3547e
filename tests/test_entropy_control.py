"""EntropyController: TRL's numbers, a band, ranks, and a toy policy whose entropy it holds."""

import json
import math

import pytest
import torch
import torch.distributed as dist

import entropy_kernels as ek
from tests import peer_losses
from tests.loss_cases import make_case
from tests.processes import meeting, spawn


def test_trl_s_adaptive_control_has_the_same_coefficients():
    """Over 80 steps whose entropies pass the target and meet it: the state, and what is applied."""
    pytest.importorskip("trl")
    generator = torch.Generator().manual_seed(0)
    entropies = 0.2 + 0.05 * torch.randn(80, generator=generator, dtype=torch.float64).cumsum(0)
    entropies = entropies.abs()
    entropies[[0, 7, 30]] = 0.2
    entropies[35:60] = 0.9
    theirs = {"entropy_target": 0.2, "entropy_coef_delta": 0.005, "entropy_coef_min": 0.0}
    theirs |= {"entropy_coef_max": 0.03, "entropy_coef": 0.01, "_last_world_entropy": math.inf}
    ours = ek.EntropyController(0.2, coef=0.01, delta=0.005, bounds=(0.0, 0.03))
    case = make_case()
    given = case.logprob, case.old, case.advantage_B, case.mask
    without = peer_losses.trl(*given, loss_type="dapo")
    applied, coefs = set(), set()
    for mean in entropies.tolist():
        entropy = torch.full_like(case.logprob, mean)
        loss = peer_losses.trl(*given, loss_type="dapo", entropy=entropy, adaptive=theirs)
        assert ours.coef == pytest.approx(float(without - loss) / mean, abs=1e-12)
        applied.add(ours.coef)
        ours.update(mean, int(case.mask.sum()))
        assert ours.state_dict()["coef"] == theirs["entropy_coef"]
        assert ours.entropy == pytest.approx(theirs["_last_world_entropy"], rel=1e-12)
        coefs.add(theirs["entropy_coef"])
    assert {0.0, 0.03} <= coefs
    assert 0.0 in applied
    assert len(applied) > 4


def test_a_band_raises_below_lowers_above_and_keeps_between():
    control = ek.EntropyController((0.2, 0.4), coef=0.01, delta=0.01, bounds=(-0.02, 0.03))
    assert control.coef == 0.01
    entropies = [0.1, 0.2, 0.4, 0.1, 0.1, 0.5, 0.3, *[0.5] * 6, 0.19]
    want = [0.02, 0.02, 0.02, 0.03, 0.03, 0.02, 0.02, 0.01, 0.0, -0.01, -0.02, -0.02, -0.02, -0.01]
    got = [control.update(torch.tensor(entropy, dtype=torch.float64)) for entropy in entropies]
    assert got == pytest.approx(want, abs=1e-12)


def test_a_band_does_not_go_below_0_unless_it_may():
    control = ek.EntropyController((0.2, 0.4), delta=0.01)
    assert control.update(0.5) == 0.0


def test_a_state_goes_through_json_and_gives_the_same_numbers():
    control = ek.EntropyController(0.2, delta=0.01)
    fresh = json.loads(json.dumps(control.state_dict()))
    assert fresh == {"coef": 0.0, "entropy": None}
    control.update(0.1)
    other = ek.EntropyController(0.2, delta=0.01)
    other.load_state_dict(json.loads(json.dumps(control.state_dict())))
    for entropy in (0.1, 0.15, 0.3, 0.1):
        assert control.update(entropy) == other.update(entropy)
        assert control.state_dict() == other.state_dict()
    narrow = ek.EntropyController(0.2, bounds=(0.0, 0.015))
    narrow.load_state_dict(control.state_dict())
    assert narrow.state_dict()["coef"] == 0.015


def test_what_cannot_be_measured_changes_nothing():
    control = ek.EntropyController(0.2, coef=0.1)
    control.update(0.1)
    before = control.state_dict()
    for entropy in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match="entropy must be a mean in nats"):
            control.update(entropy)
    control.update(math.nan, 0)
    assert control.state_dict() == before
    with pytest.raises(ValueError, match="coef and entropy; got"):
        control.load_state_dict({"coef": 0.1})
    assert control.state_dict() == before


def work(rank, folder):
    """Four tokens of 0.1 here, one of 0.6 there, none on the third; then a broken one."""
    with meeting(rank, folder, ranks=3):
        control = ek.EntropyController((0.3, 0.4), coef=0.05, group=dist.group.WORLD)
        entropy, tokens = [(0.1, 4), (0.6, 1), (math.nan, 0)][rank]
        control.update(torch.tensor(entropy), torch.tensor(tokens))
        state = control.state_dict()
        for wrong in ((math.nan, 1), (0.1, -1)):
            with pytest.raises(ValueError, match="must be"):
                control.update(*(wrong if rank == 1 else (0.1, 3)))
        assert control.state_dict() == state
        torch.save(state, f"{folder}/state-{rank}.pt")


def test_ranks_weigh_by_their_tokens_and_agree(tmp_path):
    spawn(work, (str(tmp_path),), nprocs=3)
    states = [torch.load(tmp_path / f"state-{rank}.pt") for rank in range(3)]
    assert states[0] == states[1] == states[2]
    assert states[0] == pytest.approx({"coef": 0.055, "entropy": 0.2})


def entropies_of_training(control, steps=160):
    """The mean entropy of each step of a toy: 64 tokens of a softmax policy over 16 words, by
    `high_entropy_policy_loss`, with advantages that reward one word of each token."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.eye(16)
    hidden = (0.3 * torch.randn(64, 16, generator=generator)).requires_grad_()
    right = torch.randint(16, (64,), generator=generator)
    found = []
    for _ in range(steps):
        probs = hidden.detach().softmax(1)
        target = torch.multinomial(probs, 1, generator=generator).squeeze(1)
        advantage = (target == right).float() - probs.gather(1, right[:, None]).squeeze(1)
        loss, metrics = ek.high_entropy_policy_loss(
            ek.Head(hidden, weight, target),
            None,
            advantage,
            torch.ones(64, dtype=torch.bool),
            fraction=1.0,
            entropy_bonus=ek.EntropyBonus(control.coef if control else 0.0),
        )
        (grad,) = torch.autograd.grad(loss, hidden)
        with torch.no_grad():
            hidden -= 60 * grad
        found.append(float(metrics["entropy/mean"]))
        if control is not None:
            control.update(metrics["entropy/mean"])
    return found


@pytest.fixture(scope="module")
def alone():
    return entropies_of_training(None)


def test_the_entropy_of_a_toy_policy_stays_in_the_band_and_leaves_it_without(alone):
    control = ek.EntropyController((0.9, 1.3), delta=0.03, bounds=(-0.03, 0.3))
    held = entropies_of_training(control)
    assert alone[0] > 1.3
    assert max(alone[-60:]) < 0.45
    assert sum(0.9 <= entropy <= 1.3 for entropy in held[-60:]) >= 55
    assert 0 < control.coef <= 0.3


def test_the_entropy_of_a_toy_policy_stays_at_the_target(alone):
    held = entropies_of_training(ek.EntropyController(1.0, delta=0.05))
    assert max(alone[-60:]) < 0.45
    assert sum(held[-60:]) / 60 == pytest.approx(1.0, abs=0.1)
