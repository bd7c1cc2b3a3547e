"""The options of the loss on the head, what cannot be had together, and what errors say."""

import inspect

import pytest
import torch

import entropy_kernels as ek
from entropy_kernels import losses
from entropy_kernels.testing import Watch, peaked_head
from tests.loss_cases import gradient, policy_loss, ratio_loss


def head_batch():
    h, w, y = peaked_head(4 * 12, 16, 301)
    h, y = h.reshape(4, 12, 16), y.reshape(4, 12)
    mask = torch.arange(12) < torch.tensor([12, 9, 12, 3])[:, None]
    out = ek.linear_logprob_entropy(ek.Head(h, w, y))
    old = (out.logprob + 0.2 * torch.randn(4, 12)).clamp_max(0)
    return h, w, y, old, torch.tensor([1.0, -1.0, 0.0, -0.3]), mask, out


@pytest.mark.parametrize("way", ["fraction", "selected"])
@pytest.mark.parametrize("loss_type", [n for n in losses.LOSSES if n != "dr_grpo"])
def test_the_head_takes_every_loss(loss_type, way):
    h, w, y, old, advantage, mask, out = head_batch()
    selected = ek.top_entropy_mask(out.entropy, mask, 0.5)
    options = {"loss_type": loss_type, "entropy_coef": 0.01, "token_weight": selected.float() * 0.5}
    options |= {"reference_logprob": old, "kl_coef": 0.1, "kl_type": "k2"}
    if loss_type != "vespo":
        options |= {"sampler_logprob": old - 0.1, "correction": "mis"}
    if loss_type in ("gspo", "gspo_token", "luspo", "vespo") and way == "selected":
        options["sequence_over"] = "selected"
    choice = {"selected": selected} if way == "selected" else {"fraction": 0.5}

    def fused(x):
        return policy_loss(x, w, y, old, advantage, mask, **choice, **options)[0]

    def apart(x):
        found = ek.linear_logprob_entropy(ek.Head(x, w, y))
        return ratio_loss(
            found.logprob, old, advantage, mask, selected=selected, entropy=found.entropy, **options
        )[0]

    got, want = gradient(h, fused), gradient(h, apart)
    assert want[1].abs().max() > 0
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-6)
    assert (got[1][~selected] == 0).all()


@pytest.mark.parametrize("extra", [{}, {"kl_on": "all"}, {"entropy_on": "all"}], ids=str)
def test_backward_costs_the_rows_that_get_a_gradient(extra):
    """1 + 3f units with all terms on the kept tokens, 1 + 3 with one of them on all."""
    h, w, y, old, advantage, mask, _ = head_batch()
    options = {"loss_type": "sapo", "entropy_coef": 0.01, "kl_coef": 0.1} | extra
    with Watch() as watch:
        gradient(
            h,
            lambda x: policy_loss(
                x, w, y, old, advantage, mask, fraction=0.25, reference_logprob=old, **options
            )[0],
        )
    # The weight is frozen: logits, logits again and one gradient.
    rows = int(mask.sum()) if extra else 9
    assert watch.products == (36 + 2 * rows) * 301 * 16


BEYOND = {
    "sequence": ({"loss_type": "gspo"}, "loss_type='gspo' with sequence_over=\"all\" reads"),
    "kl": ({"kl_on": "all"}, 'KL.on="all" reads tokens that are not selected'),
    "entropy": ({"entropy_on": "all"}, 'EntropyBonus.on="all" reads'),
    "correction": ({"correction": "sequence_mask"}, "'sequence_mask' without old_logprob"),
    "current": (
        {"correction": "sequence_mask", "correction_of": "current"},
        "'sequence_mask' with of=\"current\" reads",
    ),
}


@pytest.mark.parametrize(("options", "message"), BEYOND.values(), ids=BEYOND)
def test_what_reads_other_tokens_cannot_have_the_head_on_the_selected_alone(options, message):
    h, w, y, old, advantage, mask, _ = head_batch()
    more = {"reference_logprob": old, "sampler_logprob": old, "selected": mask}
    old = old if options.get("correction_of") == "current" else None
    with pytest.raises(ValueError, match=message):
        policy_loss(h, w, y, old, advantage, mask, **more, **options)
    policy_loss(h, w, y, old, advantage, mask, **(more | {"selected": None}), **options)


def test_a_ratio_that_is_not_in_the_loss_is_not_corrected():
    h, w, y, old, advantage, mask, _ = head_batch()
    options = {"sampler_logprob": old, "correction_of": "current"}
    with pytest.raises(ValueError, match="needs old_logprob, the sampler's; got None"):
        policy_loss(h, w, y, None, advantage, mask, correction="tis", **options)
    policy_loss(h, w, y, None, advantage, mask, **options)  # metrics alone


FUNCTIONS = {
    "linear_logprob_entropy": ek.linear_logprob_entropy,
    "high_entropy_policy_loss": ek.high_entropy_policy_loss,
    "ratio_loss": ek.ratio_loss,
    "top_entropy_mask": ek.top_entropy_mask,
    "entropy_threshold": ek.entropy_threshold,
    "HighEntropyPolicyLoss": ek.HighEntropyPolicyLoss.__init__,
    "HighEntropyPolicyLoss.forward": ek.HighEntropyPolicyLoss.forward,
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_an_editor_can_complete_each_of_at_most_21_parameters(function):
    parameters = inspect.signature(function).parameters
    assert len([name for name in parameters if name != "self"]) <= 21
    assert not [x for x in parameters.values() if x.kind in (x.VAR_KEYWORD, x.VAR_POSITIONAL)]


def test_the_module_takes_every_option_of_the_function():
    """Once, or in each call; and names those that forward replaces as the groups do."""
    takes = (inspect.signature(f).parameters.keys() for f in list(FUNCTIONS.values())[5:])
    fixed, called = (set(names) - {"self"} for names in takes)
    assert fixed | called >= inspect.signature(ek.high_entropy_policy_loss).parameters.keys()
    fields = {
        name
        for group in (ek.Aggregation, ek.KL, ek.Correction, ek.Backend)
        for name in group.__dataclass_fields__
    }
    function = inspect.signature(ek.high_entropy_policy_loss).parameters.keys()
    assert called - function <= fields


X = torch.zeros(2, 3)
BAD = {
    "clip of a function": ({"loss_type": losses.sapo, "clip_high": 0.1}, "functools.partial"),
    "a sum": ({"loss_type": lambda *_: X.sum()}, r"loss of each token, \(2, 3\); got \(\)"),
    "over of dapo": ({"sequence_over": "all"}, "sequence_over has no meaning.*'dapo'"),
    "dr_grpo": ({"loss_type": "dr_grpo"}, "a number, the constant length.*got 'selected'"),
    "luspo": ({"loss_type": "luspo", "denominator": "all"}, "no denominator; got 'all'"),
    "grpo": ({"loss_type": "grpo", "denominator": 3}, "own count.*got 3"),
    "sequences": ({"num_sequences": 3}, "num_sequences has a meaning"),
    "bnpo": ({"loss_type": "bnpo", "denominator": 3}, "own count.*got denominator=3"),
    "kl": ({"kl_coef": 0.1}, "KL.coef=0.1 needs reference_logprob"),
    "entropy": ({"entropy_coef": 0.1}, "EntropyBonus.coef=0.1 needs entropy"),
    "correction": ({"correction": "tis"}, "'tis' needs sampler_logprob"),
    "vespo": (
        {"loss_type": "vespo", "correction": "tis", "sampler_logprob": X},
        "give sampler_logprob as old_logprob",
    ),
    "impl": ({"loss_type": "sapo", "impl": "cpu"}, "impl='cpu' is a kernel of the clipped"),
    "impl of a range": ({"clip_low": X, "impl": "triton"}, "impl='triton' is a kernel"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_options_say_what_came_and_what_was_wanted(options, message, unchecked_shapes):
    with pytest.raises(ValueError, match=message):
        ratio_loss(X, X, X, X == 0, **options)


def test_losses_over_sequences_need_them(unchecked_shapes):
    x = torch.zeros(6)
    several = [{"loss_type": "vespo"}, {"loss_type": "grpo"}, {"aggregation": "seq-mean-token-sum"}]
    for options in several:
        with pytest.raises(ValueError, match=r"\[B, L\] inputs, or \[T\] with lengths; got \(6,\)"):
            ratio_loss(x, x, x, x == 0, **options)
    with pytest.raises(ValueError, match=r"'sequence_mask' needs sequences: \[B, L\]"):
        ratio_loss(x, x, x, x == 0, sampler_logprob=x, correction="sequence_mask")
