"""Each loss against the implementation it comes from, in fp64: TRL's and verl's code is called."""

import functools

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels import loss_terms
from tests import loss_parity, peer_losses
from tests.loss_cases import B, gradient, make_case

needs_trl = pytest.mark.skipif(not peer_losses.has("trl"), reason="trl is not installed")
needs_verl = pytest.mark.skipif(not peer_losses.has("verl"), reason="verl is not installed")
# verl adds 1e-8 to counts.
BOUND = 3e-8


@pytest.fixture(autouse=True)
def _peers_may_warn():
    """TRL warns on import of what it is to become."""
    if peer_losses.has("trl"):
        peer_losses._trl_trainers()


@pytest.fixture
def case():
    return by_sequence(make_case())


def by_sequence(case):
    """With one advantage per sequence."""
    return case._replace(advantage=case.advantage_B)


@pytest.fixture
def entropy():
    """Values of fp32: TRL's threshold is one."""
    return torch.rand(6, 9, generator=torch.Generator().manual_seed(5)).double()


def close(got, want):
    for g, w in zip(got, want, strict=True):
        assert loss_parity._relative(g, w) < BOUND
        assert w.abs().max() > 1e-4


def both(case, ours, peer, **theirs):
    """Loss and gradient of the case: by this package with the options `ours`, and by the peer."""
    tensors = case.old, case.advantage, case.mask
    mine = functools.partial(case.loss, **{"selected": None} | ours)
    return gradient(case.logprob, mine), gradient(
        case.logprob, lambda x: peer(x, *tensors, **theirs)
    )


@pytest.mark.parametrize("pair", loss_parity.pairs(), ids=lambda p: f"{p.loss_type} of {p.against}")
def test_equals_the_implementation_it_comes_from(pair):
    assert max(loss_parity.differences(pair)) < BOUND


def test_the_docs_show_what_is_tested():
    shown = loss_parity.DOCS.read_text()
    for pair in loss_parity.pairs():
        assert f"| {pair.loss_type} | {pair.against} | " in shown, "python -m tests.loss_parity"


@needs_trl
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "cispo", "sapo"])
@pytest.mark.parametrize("quantile", [1.0, 0.2])
def test_trl_with_selection_kl_and_correction(case, entropy, loss_type, quantile):
    """All of it at once: TRL's KL and its denominator are over all tokens, the rest over the top.

    Its threshold interpolates between two entropies, and keeps the same tokens here.
    """
    reference = case.logprob.flip(1)
    importance = (case.old.flip(0) * 0.1).exp()
    if loss_type == "dr_grpo":
        options = {"denominator": 16, "num_sequences": B}
    else:
        options = {"denominator": "all"}
        options |= {} if loss_type in ("dapo", "cispo") else {"num_sequences": B}
    kept = case.mask & (entropy >= torch.quantile(entropy[case.mask], 1 - quantile))
    for unbiased in (False, True):
        ours = options | {"selected": kept, "loss_type": loss_type, "token_weight": importance}
        ours |= {"reference_logprob": reference, "kl_coef": 0.04, "kl_on": "all"}
        ours["kl_type"] = "k3_corrected" if unbiased else "k3"
        found = both(
            *(case, ours, peer_losses.trl),
            loss_type=loss_type,
            epsilon=(0.2, 5.0 if loss_type == "cispo" else 0.28),
            entropy=entropy,
            quantile=quantile,
            reference=reference,
            beta=0.04,
            unbiased_kl=unbiased,
            importance=importance,
        )
        close(*found)
    if quantile < 1:
        entropy32 = entropy.float()
        assert torch.equal(ek.top_entropy_mask(entropy32, case.mask, quantile), kept)


@needs_trl
def test_trl_gmpo_selects_inside_of_its_mean(entropy):
    """With a token of each sequence: one without has the loss -A there, and no gradient."""
    case = by_sequence(make_case(empty=False))
    entropy[:, 0] = entropy[:, 0].float() + 1
    kept = case.mask & (entropy >= torch.quantile(entropy[case.mask], 0.5))
    ours = {"selected": kept, "loss_type": "gmpo", "num_sequences": B}
    theirs = {"loss_type": "gmpo", "epsilon": (0.4, 0.4), "entropy": entropy, "quantile": 0.5}
    close(*both(case, ours, peer_losses.trl, **theirs))


@needs_trl
def test_trl_gspo_with_selection_has_our_value_and_a_dense_gradient(case, entropy):
    """There the sequence's ratio carries gradient to tokens that are not selected; here not."""
    kept = case.mask & (entropy >= torch.quantile(entropy[case.mask], 0.5))
    options = {"selected": kept, "loss_type": "gspo", "denominator": "all", "num_sequences": B}
    theirs = {"loss_type": "grpo", "level": "sequence", "epsilon": (3e-4, 4e-4)}
    got, want = both(case, options, peer_losses.trl, entropy=entropy, quantile=0.5, **theirs)
    torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=0)
    assert (got[1][~kept] == 0).all()
    assert (want[1][case.mask & ~kept] != 0).any()
    torch.testing.assert_close(got[1][kept], want[1][kept], rtol=1e-10, atol=1e-14)


@needs_trl
def test_trl_entropy_bonus(case, entropy):
    """The same where the loss is a mean over tokens; TRL's is that for every loss type."""
    bonus = {"loss_type": "dapo", "entropy_coef": 0.1}
    ours, theirs = (
        gradient(case.logprob, lambda x, f=f: f(x, -entropy * x))
        for f in (
            lambda x, e: case.loss(x, selected=None, entropy=e, **bonus),
            lambda x, e: peer_losses.trl(x, *case[1:3], case.mask, entropy=e, **bonus),
        )
    )
    close(ours, theirs)


@needs_verl
@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "k1+", "k3+", "abs"])
def test_verl_kl(case, kind):
    """While its clamps, of 20 and of 10 on the value, do nothing."""
    reference = case.logprob.flip(1)
    functions = loss_terms.kl_divergence, peer_losses.verl_kl
    close(
        *(
            gradient(case.logprob, lambda x, f=f: f(x, reference, kind)[case.mask].sum())
            for f in functions
        )
    )


@needs_verl
@pytest.mark.parametrize(
    ("correction", "level", "threshold"),
    [
        ("tis", "token", 1.1),
        ("mis", "token", "0.9_1.1"),
        ("sequence_truncate", "sequence", 1.2),
        ("sequence_mask", "sequence", "0.8_1.2"),
    ],
)
def test_verl_correction(case, correction, level, threshold):
    # Sums over a sequence lie on both sides of the thresholds.
    sampler = case.old + 0.1 * (case.logprob + 2)
    weight = peer_losses.verl_correction(case.old - sampler, case.mask, level, threshold)
    assert len(set(weight[case.mask].tolist())) > 2
    low, high = threshold.split("_") if isinstance(threshold, str) else (None, threshold)
    options = {"sampler_logprob": sampler, "correction": correction}
    options |= {"correction_cap": float(high), "correction_floor": low and float(low)}
    theirs = {"loss_mode": "vanilla", "rollout_is_weights": weight}
    close(*both(case, options | {"dual_clip": 10.0}, peer_losses.verl, **theirs))


@needs_verl
@pytest.mark.parametrize(
    "aggregation",
    ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"],
)
def test_verl_aggregations(aggregation):
    """A function of one's own; verl's constant length is the padded one unless it is told."""
    denominator = 9 if aggregation.endswith("norm") else "selected"
    mine = functools.partial(ek.losses.clipped_ratio, dual_clip=10.0)
    options = {"loss_type": mine, "aggregation": aggregation, "denominator": denominator}
    theirs = {"loss_mode": "vanilla", "loss_agg_mode": aggregation}
    close(*both(make_case(), options, peer_losses.verl, **theirs))


@needs_verl
def test_verl_kl_cov():
    """Its ratio is not clipped, and the top tokens by covariance pay |log r|."""
    case = make_case()
    chosen = ek.token_rules.kl_cov(case.logprob, case.advantage, case.mask, fraction=0.2)
    assert chosen.sum() == 6
    ours = {"clip_low": 1.0, "clip_high": torch.inf, "kl_type": "abs"}
    ours |= {"reference_logprob": case.old, "kl_coef": chosen.double()}
    theirs = {"loss_mode": "kl_cov", "kl_cov_ratio": 0.2, "ppo_kl_coef": 1.0}
    close(*both(case, ours, peer_losses.verl, **theirs))


@needs_verl
def test_verl_clip_cov():
    """With as many tokens to drop as there are, its draw is no draw."""
    case = make_case()
    ratio = (case.logprob - case.old).exp()
    rose = case.advantage > 0
    clipped = torch.where(rose, ratio > 1.28, (ratio < 0.8) & (case.advantage < 0))
    keep = ek.token_rules.clip_cov(
        case.logprob, case.advantage, case.mask, fraction=1.0, low=0.1, high=5.0, clipped=clipped
    )
    assert 0 < keep.sum() < case.mask.sum()
    theirs = {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.1, "clip_cov_ub": 5.0}
    theirs["loss_mode"] = "clip_cov"
    close(*both(case, {"token_weight": keep}, peer_losses.verl, **theirs))
