"""An actor's step as verl's FSDP engine takes it, on a CPU and without sharding: packed sequences,
labels rolled by the engine, autocast, nested outputs, ppo_loss and backward."""

import math
from functools import partial

import pytest
import torch

from entropy_kernels.integrations.verl import patch_verl
from entropy_kernels.testing import Watch
from tests.integrations.small_engine import (
    PROMPTS,
    RESPONSES,
    engine_of,
    micro_batch,
    on_a_cpu,  # noqa: F401  a fixture
)
from tests.integrations.small_models import VOCABULARY as V
from tests.integrations.small_verl import actor, fused, losses

D = 16
pytestmark = pytest.mark.usefixtures("on_a_cpu")


def loss_of(engine, loss_mode, **options):
    """Loss and model outputs of one micro-batch."""
    function = partial(losses.ppo_loss, config=actor(loss_mode, **options))
    loss, output = engine.forward_step(micro_batch(), function, forward_only=False)
    return loss, [output["model_output"][name].values() for name in ("log_probs", "entropy")]


def step(engine, loss_mode):
    """The same with gradients."""
    engine.module.zero_grad()
    loss, outputs = loss_of(engine, loss_mode)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in engine.module.named_parameters()}
    return loss.detach(), outputs, gradients


@pytest.mark.parametrize("backend", ["torch", "liger"])
def test_verls_loss_is_the_same_with_either_head(backend):
    engine = engine_of(fused(backend=backend), torch.float32)
    before = step(engine, "vanilla")
    with patch_verl():
        got = step(engine, "vanilla")
    torch.testing.assert_close(got[0], before[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[1], before[1], rtol=1e-4, atol=1e-5)
    for name, gradient in before[2].items():
        atol = 1e-5 * float(gradient.abs().max())
        assert atol > 0
        torch.testing.assert_close(got[2][name], gradient, rtol=1e-3, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_high_entropy_backward_runs_on_the_selected_rows(dtype):
    model = fused()
    rows = sum(PROMPTS) + sum(RESPONSES)
    gradients = []

    def watch_hidden_states(module, inputs, output):
        """Which rows get a gradient from the head shows in that of the hidden states."""
        output.last_hidden_state.register_hook(gradients.append)

    model.model.register_forward_hook(watch_hidden_states)
    with patch_verl():
        loss, outputs, _ = step(engine_of(model, dtype), "high_entropy")
    assert loss.isfinite()
    assert outputs[1].dtype == torch.float32
    kept = (gradients[0].reshape(rows, D) != 0).any(1)
    assert 0 < int(kept.sum()) <= math.ceil(0.2 * sum(RESPONSES))
    # They are responses' rows of the highest entropy: none that is left out lies above them.
    ends = torch.tensor([p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]).cumsum(0)
    of_responses = torch.zeros(rows, dtype=torch.bool)
    for end, length in zip(ends.tolist(), RESPONSES, strict=True):
        of_responses[end - length - 1 : end - 1] = True
    k = math.ceil(0.2 * sum(RESPONSES))
    highest = outputs[1].masked_fill(~of_responses, -1).topk(k).indices
    assert set(kept.nonzero().flatten().tolist()) <= set(highest.tolist())


@pytest.mark.parametrize("loss_mode", ["vanilla", "high_entropy"])
def test_the_head_multiplies_the_rows_with_gradient_only(loss_mode):
    model = fused().requires_grad_(False)
    model.lm_head.requires_grad_(True)
    # Nothing is clipped: every selected row has a gradient.
    unclipped = {"clip_ratio_low": 1.0, "clip_ratio_high": 1e9, "clip_ratio_c": 1e9}
    with patch_verl():
        loss, _ = loss_of(engine_of(model, torch.float32), loss_mode, **unclipped)
    with Watch() as watch:
        loss.backward()
    rows = sum(RESPONSES)
    if loss_mode == "high_entropy":
        rows = math.ceil(0.2 * rows)
    # The logits again and the weight's gradient; the hidden states have none.
    assert watch.products == 2 * rows * D * V


def test_verl_itself_refuses_a_temperature_per_sample():
    engine = engine_of(fused(), torch.float32)
    with pytest.raises(AssertionError, match="does not support per sample temperature"):
        engine.prepare_model_inputs(micro_batch(torch.ones(len(PROMPTS))))
