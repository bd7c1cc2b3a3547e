"""The loss_mode "high_entropy" inside verl's own ppo_loss, as its FSDP engine calls it.

Truth is equation 6 written out in fp64; the other yardstick is verl's "vanilla" on the selected
tokens. B sequences, L the longest response.
"""

import math
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import spawn

from entropy_kernels.integrations.verl import patch_verl
from entropy_kernels.testing import Watch, peaked_head
from tests.integrations import small_verl
from tests.integrations.small_verl import core_algos, heads, losses, nested, tu

PROMPTS, RESPONSES = [3, 2, 4, 1, 3, 5], [7, 12, 5, 9, 12, 1]
B, L = len(RESPONSES), max(RESPONSES)
V, D = 301, 16
CLIP = {"low": 0.2, "high": 0.28, "c": 2.0}
FRACTION = 0.2


@pytest.fixture
def patched():
    with patch_verl(fraction=FRACTION) as patch:
        yield patch


def actor(loss_mode="high_entropy", **options):
    clips = {f"clip_ratio_{name}": bound for name, bound in CLIP.items()}
    return small_verl.actor(loss_mode, **clips, **options)


def batch(seed=0):
    """What a mini-batch holds, each field [B, L], with ratios far enough from 1 to be clipped."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(L) < torch.tensor(RESPONSES)[:, None]
    mask[1, 3:6] = False  # a tool's tokens
    h, w, y = peaked_head(B * L, D, V, seed=seed)
    # Flat distributions: most of the highest entropies are in the last two sequences.
    h[4 * L :] *= 0.3
    old = (h @ w.T).log_softmax(1).gather(1, y[:, None]).reshape(B, L)
    advantages = torch.randn(B, L, generator=generator)
    # Ratios that the dual clip stops.
    old[:, ::4] -= 1.0
    advantages[:, ::4] = -advantages[:, ::4].abs()
    return {
        "hidden": h.reshape(B, L, D),
        "weight": w,
        "target": y.reshape(B, L),
        "old_log_probs": (old + 0.3 * torch.randn(B, L, generator=generator)).clamp_max(0),
        "advantages": advantages,
        "response_mask": mask,
    }


def micro_batch(fields, rows, *, dp_size=1, tokens=None, weights=None):
    """verl's TensorDict of these sequences, without padding, and where their responses lie."""
    chosen = {name: fields[name][rows] for name in ("old_log_probs", "advantages")}
    chosen["response_mask"] = fields["response_mask"][rows].long()
    if weights is not None:
        chosen["rollout_is_weights"] = weights[rows]
    lengths = [RESPONSES[i] for i in rows]
    tensors = {
        name: nested(x[:n] for x, n in zip(values, lengths, strict=True))
        for name, values in chosen.items()
    }
    tensors["prompts"] = nested(torch.zeros(PROMPTS[i], dtype=torch.int64) for i in rows)
    tensors["responses"] = nested(torch.zeros(n, dtype=torch.int64) for n in lengths)
    info = {"dp_size": dp_size, "batch_num_tokens": tokens, "global_batch_size": B}
    return tu.get_tensordict(tensors, info)


def run(fields, rows, actor_config, *, head=None, dp_group=None, h=None, w=None, **info):
    """Loss and metrics of one micro-batch: hidden states of prompts and responses packed in a row,
    the head on all of them, and verl's ppo_loss."""
    h, w = fields["hidden"] if h is None else h, fields["weight"] if w is None else w
    hidden, labels = [], []
    for i in rows:
        # The state at p predicts the token at p + 1: the last of the prompt predicts the first of
        # the response, and the last of the response predicts nothing of it.
        n, prompt = RESPONSES[i], torch.randn(PROMPTS[i] - 1, D)
        hidden += [prompt, h[i, :n], torch.randn(1, D)]
        labels += [torch.zeros(len(prompt)), fields["target"][i, :n], torch.zeros(1)]
    packed = torch.cat(hidden)[None], w, torch.cat(labels).long()[None]
    log_probs, entropy = (heads.FusedLinearForPPO() if head is None else head)(*packed)
    lengths = torch.tensor([0] + [PROMPTS[i] + RESPONSES[i] for i in rows]).cumsum(0)
    output = {
        "log_probs": torch.nested.nested_tensor_from_jagged(log_probs[0], lengths),
        "entropy": torch.nested.nested_tensor_from_jagged(entropy[0], lengths),
    }
    data = micro_batch(fields, rows, **info)
    return losses.ppo_loss(actor_config, output, data, dp_group)


def leaves(fields):
    return [fields[name].clone().requires_grad_() for name in ("hidden", "weight")]


def formula(fields, parts, denominator, dual=CLIP["c"]):
    """Equation 6 in fp64: the sum over the top fraction of each part's tokens, over a count.

    Loss, gradients of hidden states and weight, and the masks of the parts, [B, L].
    """
    h, w = (x.double().requires_grad_() for x in (fields["hidden"], fields["weight"]))
    log_p = (h @ w.T).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1).detach()
    ratio = log_p.gather(-1, fields["target"][..., None]).squeeze(-1)
    ratio = (ratio - fields["old_log_probs"].double()).exp()
    advantage = fields["advantages"].double()
    clipped = ratio.clamp(1 - CLIP["low"], 1 + CLIP["high"])
    loss = -torch.minimum(ratio * advantage, clipped * advantage)
    loss = torch.where(advantage < 0, torch.minimum(loss, -dual * advantage), loss)
    selected = torch.zeros(B, L, dtype=torch.bool)
    for rows in parts:
        valid = torch.zeros(B, L, dtype=torch.bool)
        valid[rows] = fields["response_mask"][rows]
        k = math.ceil(FRACTION * int(valid.sum()))
        order = entropy.masked_fill(~valid, -1).flatten().topk(k).indices
        selected.view(-1)[order] = True
    total = (loss * selected).sum() / denominator
    total.backward()
    return total.detach(), h.grad, w.grad, selected


def close(got, want):
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-5 * float(y.abs().max()))


def test_one_micro_batch_is_equation_6(patched):
    fields = batch()
    n = int(fields["response_mask"].sum())
    k = math.ceil(FRACTION * n)
    h, w = leaves(fields)
    with Watch() as watch:
        loss, metrics = run(fields, range(B), actor(), h=h, w=w, tokens=n)
        loss.backward()
    *want, selected = formula(fields, [range(B)], k)
    close((loss.detach(), h.grad, w.grad), want)
    assert int(selected.sum()) == k
    assert formula(fields, [range(B)], k, dual=1e9)[0] > want[0]
    # The entropies of all tokens are differentiable and in verl's loss, times a coefficient of 0:
    # backward still runs on the selected rows alone, and not on those that are clipped.
    active = int((want[1].abs().sum(-1) > 0).sum())
    assert 0 < active < k
    assert watch.products == (sum(PROMPTS) + sum(RESPONSES) + 3 * active) * D * V
    logged = {name: float(x.values[0]) for name, x in metrics.items()}
    log_p = (fields["hidden"] @ fields["weight"].T).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    delta = fields["old_log_probs"] - log_p.gather(-1, fields["target"][..., None]).squeeze(-1)
    expected = {
        "actor/pg_loss": want[0],
        "actor/selected_fraction": k / n,
        "actor/selected_entropy": entropy[selected].mean(),
        "actor/mask_entropy": entropy[fields["response_mask"]].mean(),
        "actor/ppo_kl": delta[selected].mean(),
        "actor/pg_clipfrac": 1 - active / k,
    }
    for name, value in expected.items():
        assert logged[name] == pytest.approx(float(value), rel=1e-4), name


@pytest.mark.parametrize("denominator", ["selected", "all"])
def test_the_paper_codes_average_is_the_same_without_a_count(denominator):
    """verl's "vanilla" with the selected tokens for a mask: a masked mean, as the fork's code."""
    fields = batch()
    valid = fields["response_mask"]
    log_p = (fields["hidden"] @ fields["weight"].T).log_softmax(-1)
    log_prob = log_p.gather(-1, fields["target"][..., None]).squeeze(-1)
    *_, selected = formula(fields, [range(B)], 1)
    mean, _ = core_algos.compute_policy_loss_vanilla(
        fields["old_log_probs"], log_prob, fields["advantages"], selected, config=actor("vanilla")
    )
    if denominator == "all":
        mean = mean * selected.sum() / valid.sum()
    with patch_verl(fraction=FRACTION, denominator=denominator):
        loss, _ = run(fields, range(B), actor())
    torch.testing.assert_close(loss, mean, rtol=1e-5, atol=0)


@pytest.mark.parametrize("denominator", ["selected", "all"])
def test_micro_batches_and_ranks_add_up(denominator):
    """Each part selects among its own tokens; the count is that of the mini-batch.

    Parts of one rank are summed, and ranks averaged, which dp_size makes up for.
    """
    fields = batch()
    n = int(fields["response_mask"].sum())
    count = n if denominator == "all" else math.ceil(FRACTION * n)
    parts = [[0, 1], [2, 5], [3, 4]]
    h, w = leaves(fields)
    total = 0.0
    with patch_verl(fraction=FRACTION, denominator=denominator):
        for ranks in (1, 3):
            for rows in parts:
                loss, _ = run(fields, rows, actor(), h=h, w=w, tokens=n, dp_size=ranks)
                (loss / ranks / 2).backward()
                total += float(loss.detach()) / ranks / 2
    *want, _ = formula(fields, parts, count)
    close((torch.tensor(total), h.grad, w.grad), want)


def work(rank, folder, shares):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", len(shares))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=len(shares))
    try:
        fields = batch()
        n = int(fields["response_mask"].sum())
        h, w = leaves(fields)
        patch_verl(fraction=FRACTION, over_ranks=True)
        group = {"dp_size": len(shares), "dp_group": dist.group.WORLD}
        loss, _ = run(fields, shares[rank], actor(), h=h, w=w, tokens=n, **group)
        (loss / len(shares)).backward()
        torch.save((loss.detach() / len(shares), h.grad, w.grad), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_ranks_with_one_threshold_are_one_batch(tmp_path):
    shares = [[0, 1, 2, 3], [4, 5]]
    spawn(work, args=(str(tmp_path), shares), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    fields = batch()
    k = math.ceil(FRACTION * int(fields["response_mask"].sum()))
    *want, selected = formula(fields, [range(B)], k)
    assert not torch.equal(selected, formula(fields, shares, k)[3])
    close([x + y for x, y in zip(*parts, strict=True)], want)


def test_importance_weights_multiply_the_loss(patched):
    fields = batch()
    weights = 2 * torch.rand(B, L)
    loss, _ = run(fields, range(B), actor(), weights=weights)
    k = math.ceil(FRACTION * int(fields["response_mask"].sum()))
    fields["advantages"] = fields["advantages"] * weights
    want = formula(fields, [range(B)], k)[0]
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)


def test_a_rank_without_a_response_token_loses_nothing(patched):
    fields = batch()
    fields["response_mask"][2:4] = False
    h, w = leaves(fields)
    loss, _ = run(fields, [2, 3], actor(), h=h, w=w, tokens=20, dp_size=2)
    loss.backward()
    assert loss.detach() == 0
    assert h.grad.abs().sum() == 0
    assert w.grad.abs().sum() == 0


def test_other_losses_are_verls():
    fields = batch()
    n = int(fields["response_mask"].sum())
    head = heads.FusedLinearForPPO.forward
    results = []
    for patch in (nullcontext, patch_verl):
        torch.manual_seed(1)
        with patch():
            loss, metrics = run(
                fields,
                range(B),
                actor("vanilla", entropy_coeff=0.01),
                head=lambda *args: head(heads.FusedLinearForPPO(), *args),
                tokens=n,
            )
        results.append((float(loss), {name: x.values for name, x in metrics.items()}))
    assert results[0] == results[1]


def test_what_it_cannot_honour_raises(patched):
    fields = batch()
    with pytest.raises(ValueError, match=r"loss_agg_mode=token-mean; got seq-mean-token-mean"):
        run(fields, range(B), actor(loss_agg_mode="seq-mean-token-mean"))
    with pytest.raises(ValueError, match="strategies fsdp, fsdp2; got veomni"):
        run(fields, range(B), actor(strategy="veomni"))
    with pytest.raises(ValueError, match=r"dp_size=2 needs batch_num_tokens"):
        run(fields, range(B), actor(), dp_size=2)
    with pytest.raises(ValueError, match=r"actor\.calculate_entropy=True"):
        losses.ppo_loss(actor(), {"log_probs": None}, None)
    loss = core_algos.get_policy_loss_fn("high_entropy")
    with pytest.raises(ValueError, match="inside verl's ppo_loss only"):
        loss(*(torch.zeros(1, 1) for _ in range(4)), config=actor())
    patched.undo()
    with pytest.raises(ValueError, match="Unsupported loss mode: high_entropy"):
        run(fields, range(B), actor())
