"""What verl's agent loop knows of its tokens reaches head and loss, as verl's trainers carry it."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from entropy_kernels import Support
from entropy_kernels.integrations import _verl_rollout
from entropy_kernels.integrations.verl import patch_verl
from entropy_kernels.testing import Watch
from tests.integrations.small_engine import (
    PROMPTS,
    RESPONSES,
    TEMPERATURE,
    engine_of,
    micro_batch,
    on_a_cpu,  # noqa: F401  a fixture
)
from tests.integrations.small_models import VOCABULARY as V
from tests.integrations.small_verl import MISSING, actor, fused, heads, losses, tu

protocol = pytest.importorskip("verl.protocol", reason=MISSING)
padding = pytest.importorskip("verl.workers.utils.padding", reason=MISSING)

D = 16
TOP = 4
TOKENS = sum(RESPONSES)
SELECTED = math.ceil(0.2 * TOKENS)
# Nothing is clipped: every selected row has a gradient.
UNCLIPPED = {"clip_ratio_low": 1.0, "clip_ratio_high": 1e9, "clip_ratio_c": 1e9}
pytestmark = pytest.mark.usefixtures("on_a_cpu")


def step(model, data, loss_mode="high_entropy", **options):
    """Loss, output, metrics and gradients of one micro-batch, and the products forward made."""
    engine = engine_of(model, torch.float32)
    function = partial(losses.ppo_loss, config=actor(loss_mode, **UNCLIPPED | options))
    model.zero_grad()
    loss, output = engine.forward_step(data, function, forward_only=False)
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    return loss.detach(), output["model_output"], output["metrics"], gradients


def logits_of(model):
    """The logits that predict each response token, per sequence."""
    data, logits = micro_batch(), []
    for ids, prompt in zip(data["input_ids"].unbind(), PROMPTS, strict=True):
        hidden = model.model(input_ids=ids[None]).last_hidden_state[0]
        logits.append((hidden @ model.lm_head.weight.T / TEMPERATURE)[prompt - 1 : -1].detach())
    return logits


def entropies_of(model):
    """Each response token's entropy by the model itself, in fp64."""
    rows = [z.double().log_softmax(-1) for z in logits_of(model)]
    return [(-(logp.exp() * logp).sum(-1)).tolist() for logp in rows]


def as_v0(entropies):
    """The field of its own that the trainer V0 makes of a key of extra_fields."""
    return micro_batch(rollout_entropies=entropies)


def as_v1(entropies):
    """The one field of the trainer V1."""
    return micro_batch(extra_fields=[{"rollout_entropies": row} for row in entropies])


@pytest.mark.parametrize("carried", [as_v0, as_v1])
def test_the_loss_is_that_of_the_current_policys_entropies(carried):
    model = fused()
    with patch_verl():
        want = step(model, micro_batch())
    with patch_verl(entropy_source="sampler"):
        got = step(model, carried(entropies_of(model)))
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-7)
    for ours, theirs in zip(got[3], want[3], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 * float(theirs.abs().max()))
    assert set(got[2]) == set(want[2])
    for name, metric in want[2].items():
        if name != "actor/entropy_loss":  # of the mini-batch's tokens; same here, to rounding
            torch.testing.assert_close(got[2][name].values, metric.values, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        got[1]["entropy"].values()[_rows()], want[1]["entropy"].values()[_rows()], rtol=1e-4, atol=0
    )


def _rows():
    """The packed rows that predict responses."""
    ends = torch.tensor([p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]).cumsum(0)
    rows = [
        torch.arange(end - r - 1, end - 1) for end, r in zip(ends.tolist(), RESPONSES, strict=True)
    ]
    return torch.cat(rows)


def products(model, data, **options):
    """Rows that the head multiplies in forward, of a model whose head alone is trained."""
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    engine = engine_of(model, torch.float32)
    function = partial(losses.ppo_loss, config=actor("high_entropy", **UNCLIPPED | options))
    found = {}

    def begin(module, inputs, output):
        found["watch"] = Watch().__enter__()

    hook = model.model.register_forward_hook(begin)
    try:
        loss, _ = engine.forward_step(data, function, forward_only=False)
    finally:
        hook.remove()
        found["watch"].__exit__(None, None, None)
    with Watch() as watch:
        loss.backward()
    return found["watch"].products / (D * V), watch.products / (D * V)


@pytest.mark.parametrize("unpadded", [True, False])
@pytest.mark.parametrize("calculate_entropy", [True, False])
def test_the_head_sees_the_selected_tokens_alone(unpadded, calculate_entropy):
    model = fused()
    data = micro_batch(
        rollout_entropies=entropies_of(model),
        use_remove_padding=unpadded,
        calculate_entropy=calculate_entropy,
    )
    with patch_verl(entropy_source="sampler"):
        forward, backward = products(model, data)
    assert forward == SELECTED
    # The logits again and the weight's gradient; the hidden states have none.
    assert backward == 2 * SELECTED


@pytest.mark.parametrize("options", [{"entropy_coeff": 0.01}, {"use_kl_loss": True}])
def test_the_head_sees_all_tokens_where_the_loss_reads_them(options):
    model = fused()
    data = as_v0(entropies_of(model))
    data["ref_log_prob"] = data["old_log_probs"]
    with patch_verl(entropy_source="sampler"):
        forward, _ = products(model, data, **options)
    assert forward == sum(PROMPTS) + TOKENS


def test_unpadded_and_padded_batches_have_the_same_loss():
    model = fused()
    entropies = entropies_of(model)
    with patch_verl(entropy_source="sampler"):
        found = [
            step(model, micro_batch(rollout_entropies=entropies, use_remove_padding=unpadded))
            for unpadded in (True, False)
        ]
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-7)


def sets_of(model):
    """The ids of the highest logits and each target."""
    found = []
    for z, ids in zip(logits_of(model), micro_batch()["responses"].unbind(), strict=True):
        tops = z.topk(TOP).indices.tolist()
        found.append([sorted({*top, y}) for top, y in zip(tops, ids.tolist(), strict=True)])
    return found


def as_fields(rows):
    """What AgentLoopOutput.as_dict() makes of a Support."""
    return {**vars(Support.of(rows))}


@pytest.mark.parametrize("given", [list, Support.of, as_fields])
@pytest.mark.parametrize("unpadded", [True, False])
def test_log_probs_and_entropies_are_over_the_sets(unpadded, given):
    """In the pass of old log-probs, which has no loss, and in training; 0 for prompts."""
    model = fused()
    sets, want, entropy = sets_of(model), [], []
    for z, rows, ids in zip(
        logits_of(model), sets, micro_batch()["responses"].unbind(), strict=True
    ):
        for z_V, row, target in zip(z.double(), rows, ids, strict=True):
            logp = z_V[row].log_softmax(0)
            want.append(float(logp[row.index(int(target))]))
            entropy.append(-float((logp.exp() * logp).sum()))
    given_sets = [given(rows) for rows in sets]
    data = micro_batch(rollout_sets=given_sets, use_remove_padding=unpadded)
    with patch_verl(sets=True):
        with torch.no_grad():
            _, old = engine_of(model, torch.float32).forward_step(data, None, forward_only=True)
        trained = step(model, data, "vanilla")
    for output in (old["model_output"], trained[1]):
        for name, truth in (("log_probs", want), ("entropy", entropy)):
            packed = output[name].values()
            torch.testing.assert_close(
                packed[_rows()], torch.tensor(truth).float(), rtol=1e-5, atol=1e-6
            )
            packed[_rows()] = 0
            assert not packed.any()
    assert all(gradient.isfinite().all() for gradient in trained[3])


def test_a_sampled_mask_over_sets():
    """The head has the selected tokens' sets alone; no full product runs."""
    model = fused()
    data = micro_batch(rollout_sets=sets_of(model), rollout_entropies=entropies_of(model))
    with patch_verl(sets=True, entropy_source="sampler"):
        loss, _, metrics, gradients = step(model, data)
    assert loss.isfinite()
    assert float(metrics["actor/selected_fraction"].values[0]) == pytest.approx(SELECTED / TOKENS)
    head = model.lm_head.weight.grad if model.lm_head.weight.grad is not None else gradients[-1]
    assert 0 < int((head != 0).any(1).sum()) <= SELECTED * (TOP + 1)


def test_extra_fields_pass_through_the_trainer_v0():
    """DataProto, TensorDict without padding, mini-batches in another order, micro-batches."""
    count, prompt, response = 4, 3, 5
    generator = torch.Generator().manual_seed(3)
    entropies = [torch.rand(response, generator=generator).tolist() for _ in range(count)]
    held = np.empty(count, dtype=object)
    held[:] = entropies
    ids = torch.randint(V, (count, prompt + response), generator=generator)
    ones = torch.ones_like(ids)
    batch = protocol.DataProto.from_dict(
        tensors={
            "input_ids": ids,
            "attention_mask": ones,
            "position_ids": ones.cumsum(1) - 1,
            "prompts": ids[:, :prompt],
            "responses": ids[:, prompt:],
            "response_mask": ones[:, prompt:],
        },
        non_tensors={"rollout_entropies": held},
    )
    data = padding.left_right_2_no_padding(batch.to_tensordict())
    shuffled = tu.index_select_tensor_dict(data, torch.tensor([2, 0, 3, 1]))
    found = []
    for part in tu.chunk_tensordict(shuffled, 2):
        known, mask_BL = _verl_rollout._places(part)
        rows = _verl_rollout._field(part, "rollout_entropies", known, mask_BL)
        found += [list(row) for row in rows]
    assert found == [entropies[i] for i in (2, 0, 3, 1)]


def test_extra_fields_pass_through_the_trainer_v1():
    """The TensorDict that is put into the queue, of AgentLoopOutput.as_dict()'s dictionaries."""
    fields = [
        {
            "responses": torch.arange(n),
            "input_ids": torch.arange(n + 2),
            "response_mask": torch.ones(n, dtype=torch.int64),
            "extra_fields": {"rollout_entropies": [0.5 * n] * n},
        }
        for n in (2, 3)
    ]
    data = tu.list_of_dict_to_tensordict(fields)
    data = tu.index_select_tensor_dict(data, torch.tensor([1, 0]))
    known, mask_BL = _verl_rollout._places(data)
    found = _verl_rollout._field(data, "rollout_entropies", known, mask_BL)
    assert found == [[1.5] * 3, [1.0] * 2]


def wrong(model, change):
    entropies = entropies_of(model)
    change(entropies)
    return as_v0(entropies)


WRONG = {
    "short": (lambda rows: rows[1].pop(), r"each of the response's 12 tokens; got 11"),
    "none": (lambda rows: rows.__setitem__(1, None), r"response's 12 tokens; got none"),
    "nan": (lambda rows: rows[1].__setitem__(2, math.nan), "must be finite and not negative"),
    "negative": (lambda rows: rows[1].__setitem__(2, -1.0), "must be finite and not negative"),
}


@pytest.mark.parametrize("name", WRONG)
def test_fields_that_do_not_fit_are_refused(name):
    model = fused()
    change, message = WRONG[name]
    with patch_verl(entropy_source="sampler"), pytest.raises(ValueError, match=message):
        step(model, wrong(model, change))


def test_missing_fields_are_refused():
    model = fused()
    with patch_verl(entropy_source="sampler"), pytest.raises(ValueError, match=r"'rollout_entro"):
        step(model, micro_batch())
    with patch_verl(sets=True), pytest.raises(ValueError, match=r"'rollout_sets' .* got none"):
        step(model, micro_batch())


def test_a_padding_sequence_needs_no_field():
    """Its response mask is false."""
    model = fused()
    entropies = entropies_of(model)
    data = as_v0([entropies[0], entropies[1], [0.1]])
    data["response_mask"].values()[-RESPONSES[2] :] = 0
    with patch_verl(entropy_source="sampler"):
        loss, *_ = step(model, data)
    assert loss.isfinite()


def test_another_engines_loss_is_refused():
    data = micro_batch()
    output = {"log_probs": data["input_ids"].float(), "entropy": data["input_ids"].float()}
    with (
        patch_verl(entropy_source="sampler"),
        pytest.raises(ValueError, match="in FSDP's engine only"),
    ):
        losses.ppo_loss(actor(), output, data)


def test_another_engines_head_is_refused():
    head = heads.FusedLinearForPPO()
    with patch_verl(sets=True), pytest.raises(ValueError, match="in FSDP's engine only"):
        head(torch.randn(1, 3, D), torch.randn(V, D), torch.zeros(1, 3, dtype=torch.int64))


def test_a_critics_step_reads_nothing():
    with patch_verl(entropy_source="sampler"):
        found = step(fused(), micro_batch(), "vanilla")
    assert found[0].isfinite()
