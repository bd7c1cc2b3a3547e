"""The recipe for verl: every setting exists in verl's configuration, and is the paper's."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples" / "verl_high_entropy_14b.sh"
MISSING = "verl is not installed"
hydra = pytest.importorskip("hydra", reason=MISSING)
verl = pytest.importorskip("verl", reason=MISSING)

# arXiv 2506.01939, section 5.2, and the authors' script for 14B.
ACTOR = {
    "strategy": "fsdp",
    "clip_ratio_low": 0.2,
    "clip_ratio_high": 0.28,
    "clip_ratio_c": 10.0,
    "loss_agg_mode": "token-mean",
    "entropy_coeff": 0,
    "use_kl_loss": False,
    "kl_loss_coef": 0.0,
    "ppo_mini_batch_size": 32,
    "ppo_epochs": 1,
    "use_dynamic_bsz": True,
    "ppo_max_token_len_per_gpu": 22528,
    "ulysses_sequence_parallel_size": 8,
    "calculate_entropy": True,
    "policy_loss.loss_mode": "high_entropy",
    "optim.lr": 1e-6,
    "optim.lr_scheduler_type": "constant",
    "optim.lr_warmup_steps": 10,
    "optim.weight_decay": 0.1,
    "optim.clip_grad": 1.0,
    "fsdp_config.param_offload": True,
    "fsdp_config.optimizer_offload": True,
}
SETTINGS = {
    **{f"actor_rollout_ref.actor.{name}": value for name, value in ACTOR.items()},
    "actor_rollout_ref.model.use_fused_kernels": True,
    "actor_rollout_ref.model.fused_kernel_options.impl_backend": "torch",
    "actor_rollout_ref.model.external_lib": "entropy_kernels.integrations.verl_external_lib",
    "actor_rollout_ref.model.path": "Qwen/Qwen3-14B-Base",
    "actor_rollout_ref.rollout.n": 16,
    "actor_rollout_ref.rollout.temperature": 1.0,
    "actor_rollout_ref.rollout.top_p": 1.0,
    "actor_rollout_ref.rollout.top_k": -1,
    "actor_rollout_ref.rollout.val_kwargs.top_p": 0.7,
    "algorithm.adv_estimator": "grpo",
    "algorithm.norm_adv_by_std_in_grpo": True,
    "algorithm.use_kl_in_reward": False,
    "algorithm.rollout_correction.bypass_mode": False,
    "algorithm.filter_groups.enable": True,
    "algorithm.filter_groups.metric": "acc",
    # 1536 prompts drawn for 512.
    "algorithm.filter_groups.max_inflight_gen_batches": 3,
    "data.train_batch_size": 512,
    "data.max_prompt_length": 2048,
    "data.max_response_length": 20480,
    "reward.reward_manager.name": "dapo",
    "reward.reward_kwargs.overlong_buffer_cfg.enable": True,
    "reward.reward_kwargs.overlong_buffer_cfg.len": 4096,
    "reward.reward_kwargs.overlong_buffer_cfg.penalty_factor": 1.0,
    "reward.reward_kwargs.max_resp_len": 20480,
    "trainer.nnodes": 16,
    "trainer.n_gpus_per_node": 8,
    "trainer.use_v1": True,
    "trainer.v1.trainer_mode": "sync",
}


@pytest.fixture(scope="module")
def overrides():
    environment = {"PATH": os.environ["PATH"], "HOME": "/home/user", "PYTHON": "echo"}
    ran = subprocess.run(
        ["bash", RECIPE, "trainer.nnodes=16"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    module, *words = ran.stdout.split()[1:]
    assert module == "verl.trainer.main_ppo"
    return words


@pytest.fixture(scope="module")
def composed(overrides):
    """As verl's main composes it; a key that verl does not have raises here, but for one with +."""
    folder = Path(verl.__file__).parent / "trainer" / "config"
    with hydra.initialize_config_dir(str(folder), version_base=None):
        return hydra.compose("ppo_trainer", overrides=overrides)


def test_every_key_exists_or_is_one_that_verl_reads_besides(overrides):
    added = [word for word in overrides if word.startswith("+")]
    assert all(word.startswith("+reward.reward_kwargs.") for word in added)
    names = [word.split("=")[0] for word in overrides[:-1]]
    assert len(names) == len(set(names))
    source = Path(verl.__file__).parent / "experimental" / "reward_loop" / "reward_manager"
    reads = (source / "dapo.py").read_text()
    for word in added:
        assert word.split("=")[0].rpartition(".")[2] in reads


@pytest.mark.parametrize("name", SETTINGS)
def test_the_setting_is_the_papers(composed, name):
    from omegaconf import OmegaConf

    assert OmegaConf.select(composed, name, throw_on_missing=True) == SETTINGS[name]


def test_verl_accepts_it(composed):
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    validate_config(composed, use_reference_policy=False, use_critic=False)
    actor = omega_conf_to_dataclass(composed.actor_rollout_ref.actor)
    assert actor.engine.ulysses_sequence_parallel_size == 8
    assert actor.optim.clip_grad == 1.0
    # 512 prompts in mini-batches of 32 are the paper's 16 updates a step.
    assert composed.data.train_batch_size // actor.ppo_mini_batch_size == 16
