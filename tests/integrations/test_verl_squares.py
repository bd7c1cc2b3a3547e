"""verl's sum of squared probabilities, of its fused head under patch_verl."""

from types import SimpleNamespace

import pytest
import torch

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
from tests.integrations.small_models import build
from tests.integrations.small_verl import MISSING, core_algos, fused

functional = pytest.importorskip("verl.utils.torch_functional", reason=MISSING)

D = 16
ROWS = sum(PROMPTS) + sum(RESPONSES)
pytestmark = pytest.mark.usefixtures("on_a_cpu")


def scored(engine, dtype=torch.float32, **changes):
    """What compute_log_prob asks of the engine: model outputs, without a loss."""
    options = {"calculate_sum_pi_squared": True} | changes
    with torch.no_grad():
        _, output = engine.forward_step(micro_batch(**options), None, forward_only=True)
    return output["model_output"]


def by_logits(**changes):
    """verl's own, of the logits of the same model without a fused head."""
    engine = engine_of(build("qwen3"), torch.float32)
    settings = ("entropy_checkpointing", "entropy_from_logits_with_chunking")
    engine.engine_config = SimpleNamespace(**dict.fromkeys(settings, False))
    engine.compute_entropy_from_logits = functional.entropy_from_logits
    return scored(engine, use_fused_kernels=False, **changes)


@pytest.mark.parametrize("backend", ["torch", "liger"])
@pytest.mark.parametrize("packed", [True, False])
def test_they_are_verls_own_of_the_logits(backend, packed):
    engine = engine_of(fused(backend=backend), torch.float32)
    with pytest.raises(NotImplementedError, match="not supported with use_fused_kernels=True"):
        scored(engine)
    with patch_verl():
        found = scored(engine, use_remove_padding=packed)
    wanted = by_logits(use_remove_padding=packed)
    assert found.keys() == wanted.keys() == {"log_probs", "entropy", "sum_pi_squared"}
    if not packed:
        # At the end of a sequence the two label what is no token.
        del wanted["log_probs"]
    for name, truth in wanted.items():
        assert torch.equal(found[name].offsets(), truth.offsets())
        torch.testing.assert_close(found[name].values(), truth.values(), rtol=1e-4, atol=1e-5)
    assert found["sum_pi_squared"].dtype == torch.float32
    assert found["sum_pi_squared"].values().std() > 0.01


def test_the_head_runs_once_for_all_three():
    with patch_verl():
        engine = engine_of(fused(), torch.float32)
        products = []
        for wanted in (False, True):
            with Watch() as watch:
                found = scored(engine, calculate_sum_pi_squared=wanted)
            assert ("sum_pi_squared" in found) == wanted
            products.append(watch.products)
    assert products[0] == products[1] >= ROWS * D * V


def test_the_baseline_that_reads_them_takes_them():
    """verl's optimal token baseline, of the responses' tokens, with ours and with its own."""
    with patch_verl():
        ours = scored(engine_of(fused(), torch.float32))
    advantages = [_baseline(found) for found in (ours, by_logits())]
    assert advantages[0].abs().max() > 0.1
    torch.testing.assert_close(*advantages, rtol=1e-4, atol=1e-5)


def _baseline(found):
    shape = len(RESPONSES), max(RESPONSES)
    mask, logprob, squares = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape)
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        span = slice(prompt - 1, prompt + response - 1)
        mask[i, :response] = 1
        logprob[i, :response] = found["log_probs"].unbind()[i][span]
        squares[i, :response] = found["sum_pi_squared"].unbind()[i][span]
    reward = torch.zeros(shape)
    reward[:, 0] = torch.tensor([1.0, 0.0, 2.0])
    advantage, _ = core_algos.compute_optimal_token_baseline_advantage(
        token_level_rewards=reward,
        response_mask=mask,
        index=torch.zeros(len(RESPONSES), dtype=torch.long).numpy(),
        old_log_probs=logprob,
        sum_pi_squared=squares,
    )
    return advantage


def test_over_sets_it_is_refused():
    sets = [[[5, 6]] * n for n in RESPONSES]
    with patch_verl(sets=True):
        engine = engine_of(fused(), torch.float32)
        with pytest.raises(ValueError, match="whole vocabulary; got sets=True"):
            scored(engine, rollout_sets=sets)


def test_a_model_that_does_not_call_the_head_is_told():
    with patch_verl():
        engine = engine_of(build("qwen3"), torch.float32)
        engine.prepare_model_inputs(micro_batch(calculate_sum_pi_squared=True))
        with pytest.raises(ValueError, match="calls verl's fused head"):
            engine.prepare_model_outputs(None, {}, micro_batch(calculate_sum_pi_squared=True), None)


def test_one_micro_batch_leaves_nothing_to_the_next():
    with patch_verl():
        engine = engine_of(fused(), torch.float32)
        first = scored(engine)
        assert "sum_pi_squared" not in scored(engine, calculate_sum_pi_squared=False)
        again = scored(engine, temperature=2 * TEMPERATURE)
    assert not torch.equal(first["sum_pi_squared"].values(), again["sum_pi_squared"].values())
