"""TRL's and verl's own losses, called on log-probs that are given: no model, no data, no cluster.

Each takes (logprob, old_logprob, advantage [B], mask) as fp64 and returns the peer's loss.
"""

import functools
import importlib.util
import sys
import warnings
from collections import defaultdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor

# The state of TRL's entropy control.
CONTROLLED = ("entropy_coef", "_last_world_entropy")


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _same(x: Tensor, *_: Any, **__: Any) -> Tensor:
    """What a collective of one process does."""
    return x


@functools.cache
def _trl_trainers() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl import GRPOTrainer
        from trl.experimental.gmpo import GMPOTrainer
    return {"grpo": GRPOTrainer, "gmpo": GMPOTrainer}


def trl(
    logprob: Tensor,
    old: Tensor,
    advantage_B: Tensor,
    mask: Tensor,
    *,
    loss_type: str,
    level: str = "token",
    epsilon: tuple[float, float] = (0.2, 0.28),
    delta: float | None = None,
    max_length: int = 16,
    entropy: Tensor | None = None,
    quantile: float = 1.0,
    entropy_coef: float = 0.0,
    reference: Tensor | None = None,
    beta: float = 0.0,
    unbiased_kl: bool = False,
    importance: Tensor | None = None,
    adaptive: dict[str, float] | None = None,
) -> Tensor:
    """`_compute_loss` of GRPOTrainer (of GMPOTrainer for "gmpo"), with what it reads of itself.

    `adaptive` holds the entropy control: its arguments, and its state, which the call moves on.
    """
    trainer = _trl_trainers()["gmpo" if loss_type == "gmpo" else "grpo"]
    entropy = torch.zeros_like(logprob) if entropy is None else entropy
    self = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprob, entropy, None),
        get_off_policy_mask=trainer.get_off_policy_mask,
        get_gamma_weights=trainer.get_gamma_weights,
        accelerator=SimpleNamespace(
            num_processes=1, gather=_same, reduce=_same, pad_across_processes=_same
        ),
        args=SimpleNamespace(
            delta=delta,
            use_bias_correction_kl=unbiased_kl,
            # As tensors, that torch.where of two floats does not round them to fp32.
            sapo_temperature_pos=torch.tensor(1.0, dtype=torch.float64),
            sapo_temperature_neg=torch.tensor(1.05, dtype=torch.float64),
            vespo_k_pos=2.0,
            vespo_lambda_pos=3.0,
            vespo_k_neg=3.0,
            vespo_lambda_neg=2.0,
            steps_per_generation=1,
        ),
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon_low=epsilon[0],
        epsilon_high=epsilon[1],
        beta=beta,
        top_entropy_quantile=quantile,
        off_policy_mask_threshold=None,
        use_vllm=importance is not None,
        vllm_importance_sampling_correction=importance is not None,
        max_completion_length=max_length,
        current_gradient_accumulation_steps=1,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=entropy_coef != 0,
        use_adaptive_entropy=False,
        entropy_coef=entropy_coef,
        model=SimpleNamespace(training=False),
        _metrics={"eval": defaultdict(list)},
    )
    if adaptive is not None:
        self.use_adaptive_entropy = self._entropy_bonus_enabled = self.model.training = True
        self.accelerator.sync_gradients, self._entropy_window_stats = True, None
        self._metrics = {"train": defaultdict(list)}
        vars(self.args).update(adaptive)
        vars(self).update({name: adaptive[name] for name in CONTROLLED})
    self.get_high_entropy_mask = functools.partial(trainer.get_high_entropy_mask, self)
    ids = torch.zeros(mask.shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1] + 1,
        "completion_ids": ids,
        "completion_mask": mask.long(),
        "advantages": advantage_B,
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
    }
    if importance is not None:
        inputs["importance_sampling_ratio"] = importance
    loss = trainer._compute_loss(self, None, inputs)
    if adaptive is not None:
        adaptive |= {name: getattr(self, name) for name in CONTROLLED}
    return loss


class _Stub(ModuleType):
    """A module that has every class, each a namespace."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, type(name, (SimpleNamespace,), {}))
        return getattr(self, name)


@functools.cache
def _verl() -> tuple[ModuleType, ModuleType]:
    """verl's core_algos and rollout_corr_helper, without what its packages start at import: Ray."""
    root = Path(str(importlib.util.find_spec("verl").origin)).parent
    stubs = [
        "omegaconf",
        "tensordict",
        "transformers",
        "verl",
        "verl.protocol",
        "verl.trainer",
        "verl.trainer.config",
        "verl.trainer.config.algorithm",
        "verl.utils",
        "verl.utils.device",
        "verl.workers",
        "verl.workers.config",
        "verl.workers.config.actor",
    ]
    with mock.patch.dict(sys.modules, {name: _Stub(name) for name in stubs}):
        for name in stubs:
            _hang_on_parent(name)
        modules = [
            _load(name, root)
            for name in (
                "verl.utils.import_utils",
                "verl.utils.torch_functional",
                "verl.trainer.ppo.core_algos",
                "verl.trainer.ppo.rollout_corr_helper",
            )
        ]
    return modules[2], modules[3]


def _load(name: str, root: Path) -> ModuleType:
    path = root.joinpath(*name.split(".")[1:]).with_suffix(".py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    _hang_on_parent(name)
    spec.loader.exec_module(module)
    return module


def _hang_on_parent(name: str) -> None:
    parent, _, child = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], child, sys.modules[name])


def verl(
    logprob: Tensor,
    old: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    loss_mode: str,
    clip: tuple[float, float] = (0.2, 0.28),
    clip_ratio_c: float = 10.0,
    loss_agg_mode: str = "token-mean",
    rollout_is_weights: Tensor | None = None,
    **policy_loss: Any,
) -> Tensor:
    """A registered policy loss of core_algos."""
    core, _ = _verl()
    values = {"clip_ratio_c": clip_ratio_c}
    config = core.ActorConfig(
        clip_ratio=clip[0],
        clip_ratio_low=clip[0],
        clip_ratio_high=clip[1],
        tau_pos=1.0,
        tau_neg=1.05,
        global_batch_info={},
        policy_loss=SimpleNamespace(**policy_loss),
        get=lambda name, default=None: values.get(name, default),
    )
    if advantage.ndim == 1:
        advantage = advantage[:, None].expand_as(logprob)
    loss = core.get_policy_loss_fn(loss_mode)
    return loss(
        old_log_prob=old,
        log_prob=logprob,
        advantages=advantage,
        response_mask=mask.to(logprob.dtype),
        loss_agg_mode=loss_agg_mode,
        config=config,
        rollout_is_weights=rollout_is_weights,
    )[0]


def verl_kl(logprob: Tensor, reference: Tensor, kind: str) -> Tensor:
    return _verl()[0].kl_penalty(logprob, reference, kind)


def verl_correction(log_ratio: Tensor, mask: Tensor, level: str, threshold: str | float) -> Tensor:
    """Its weights of tokens or sequences, truncated or, with "low_high", masked."""
    return _verl()[1].compute_rollout_correction_weights(
        log_ratio, mask.to(log_ratio.dtype), rollout_is=level, rollout_is_threshold=threshold
    )[0]
