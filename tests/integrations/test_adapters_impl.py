"""`impl=` of the adapters: that backend runs wherever a patched library asks the package."""

from types import SimpleNamespace

import pytest
import torch

from entropy_kernels.integrations import verl
from entropy_kernels.integrations.hf import patch_lm_head
from tests.integrations.small_models import batch, build
from tests.which_ran import ALL, HEAD, LOSS, SELECTION, WhichRan


@pytest.fixture
def ran(monkeypatch):
    return WhichRan(monkeypatch)


def test_a_patched_model(impl, ran):
    model = build("qwen3")
    with patch_lm_head(model, impl=impl):
        out = model(**batch())
    (out.logprob.sum() + out.entropy.sum()).backward()
    ran.assert_only(impl, HEAD)


def one_step_of_trl(folder, **options):
    pytest.importorskip("trl", reason="the adapter is for TRL")
    from entropy_kernels.integrations.trl import patch_trl
    from tests.integrations.small_grpo import train

    sizes = {"max_steps": 1, "per_device_train_batch_size": 2, "num_generations": 2}
    with patch_trl(**options):
        train(folder, top_entropy_quantile=0.2, max_completion_length=3, **sizes)


@pytest.mark.filterwarnings("ignore")  # of TRL's and transformers'
@pytest.mark.parametrize("scope", ["micro-batch", "step"])
def test_a_trainer_of_trl(scope, impl, ran, tmp_path):
    """TRL's own rule finds its threshold by a quantile."""
    one_step_of_trl(tmp_path, scope=scope, impl=impl)
    ran.assert_only(impl, HEAD | (SELECTION if scope == "step" else set()))


@pytest.mark.filterwarnings("ignore")
def test_beside_the_reference_the_threshold_of_a_step_is_torch_s(ran, tmp_path):
    one_step_of_trl(tmp_path, scope="step", impl="reference")
    ran.assert_only("torch", SELECTION)


def step_of_verl(impl):
    """What the patch gives to verl, called as verl calls it."""
    options = {"impl": impl, "fraction": 0.2, "over_ranks": False, "denominator": "selected"}
    options |= {"entropy_source": "current", "sets": False}
    B, L, D, V = 2, 5, 16, 40
    hidden, weight = torch.randn(B, L, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    nothing_known = verl.Rollout(False, False, torch.where)
    forward = verl._head(impl, nothing_known, verl.Squares(nothing_known))
    logprob, entropy = forward(None, hidden, weight, torch.randint(V, (B, L)))
    config = SimpleNamespace(
        policy_loss={"loss_mode": "high_entropy"},
        strategy="fsdp",
        clip_ratio_low=0.2,
        clip_ratio_high=0.28,
        clip_ratio=0.2,
        get={"clip_ratio_c": 3.0}.get,
        global_batch_info={},
    )

    def ppo_loss(config, model_output, data, group):
        old, advantages, mask = logprob.detach(), torch.randn(B, L), torch.ones(B, L)
        return loss.policy_loss(old, logprob, advantages, mask, config=config)

    losses = SimpleNamespace(ppo_loss=ppo_loss, no_padding_2_padding=lambda x, data: x)
    loss = verl._HighEntropyLoss(losses, options)
    value, _ = loss.ppo_loss(config, {"entropy": entropy}, None)
    value.backward()


def test_an_actor_of_verl(impl, ran):
    step_of_verl(impl)
    ran.assert_only(impl, ALL)


def test_beside_the_reference_an_actor_s_loss_is_torch_s(ran):
    step_of_verl("reference")
    ran.assert_only("torch", SELECTION | LOSS)
