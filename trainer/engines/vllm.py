"""Sampling with vLLM, in the trainer's process or in one beside it.

The engine starts from the configuration alone. Its weights are pushed, from memory to memory,
before the first request and after every step. Sleep and the transfers by CUDA and NCCL need a GPU,
and have not run on one.
"""

import copy
import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from entropy_kernels.integrations import vllm as entropies
from trainer.config import NO_TRUNCATION, Config, Truncation
from trainer.config import Engine as Settings
from trainer.engines.engine import Sampled
from trainer.engines.vllm_setup import backend, own_threads, set_environment
from trainer.launch.limits import check_length, check_ranks, devices_of
from trainer.launch.needs import check_engine
from trainer.model.rope import fixed_configuration
from trainer.policy import Policy
from trainer.ranks import local_ranks

CPU_CACHE_BYTES = 2**28


class VllmEngine:
    """A vLLM engine of the architecture of `policy`, on or beside `device`, where that trains.

    Raises:
        ValueError: vLLM is missing, or older than the calls made here; too few GPUs are set aside.
    """

    logits_processors: Sequence[str] = ()
    """vLLM's logits processors, "module:Class", that a subclass needs; entropies come after."""

    def __init__(self, policy: Policy, config: Config, device: torch.device):
        settings = config.engine
        set_environment(settings, device)
        check_engine(config)
        self._eos_ids = policy.eos_ids.tolist()
        self._sleeps = device.type == "cuda" and not settings.devices
        self._asleep = False
        with tempfile.TemporaryDirectory() as folder, own_threads():
            _write_configuration(policy, folder)
            from vllm import LLM

            options = _options(config, device, self._sleeps)
            if policy.rope:
                options["max_model_len"] = policy.longest  # which decides on their scale
            options["logits_processors"] = list(self.logits_processors)
            self._llm = LLM(folder, **entropies.options(**options))
        self._longest = self._llm.llm_engine.model_config.max_model_len
        self._push = _pusher(self._llm, policy, settings, device)
        self._keys = itertools.count()

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
        truncation: Truncation = NO_TRUNCATION,
    ) -> list[Sampled]:
        """As `Engine.sample`."""
        from vllm import SamplingParams

        if not prompts:
            return []
        longest = max(map(len, prompts))
        check_length("engine.max_model_len, {}", self._longest, longest, max_new_tokens)
        keys = [next(self._keys) for _ in prompts]
        parameters = [
            SamplingParams(
                seed=seed,
                temperature=temperature,
                top_k=truncation.top_k,
                top_p=truncation.top_p,
                min_p=truncation.min_p,
                max_tokens=max_new_tokens,
                stop_token_ids=self._eos_ids,
                ignore_eos=True,  # the policy's own are stop_token_ids
                logprobs=0,  # of the token sampled, and no others
                flat_logprobs=True,
                detokenize=False,
                extra_args=self.extra_args(),
            )
            for seed in seeds
        ]
        requests: list[Any] = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        asking = [entropies.recorded(p, key, True) for p, key in zip(parameters, keys, strict=True)]
        answers = self._llm.generate(requests, asking, use_tqdm=False)
        lengths = [len(answer.outputs[0].token_ids) for answer in answers]
        found = entropies.take(self._llm, keys, lengths)
        return [_sampled(a.outputs[0], one) for a, one in zip(answers, found, strict=True)]

    def sleep(self) -> None:
        """Free the GPU that the trainer shares: weights and cache; elsewhere nothing."""
        if self._sleeps and not self._asleep:
            self._llm.sleep(level=2)
            self._asleep = True

    def update_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """As `Engine.update_weights`; the cache of the old weights is dropped."""
        if self._asleep:
            self._llm.wake_up(tags=["weights"])
        self._push(weights)
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache, which holds states of older weights")

    def close(self) -> None:
        """End vLLM, and with it the process group that it shares with the trainer."""
        self._llm.llm_engine.engine_core.shutdown()

    def extra_args(self) -> dict[str, Any] | None:
        """What each request gives the logits processors of a subclass."""
        return None


def _sampled(completion: Any, recorded: entropies.Recorded) -> Sampled:
    logprobs = torch.tensor(completion.logprobs.logprobs, dtype=torch.float32)
    tokens = torch.tensor(completion.token_ids, dtype=torch.long)
    return Sampled(tokens, logprobs, recorded.entropies, recorded.kept)


def _write_configuration(policy: Policy, folder: str) -> None:
    """A transformers folder without weights."""
    configuration = copy.deepcopy(policy.model.config)
    configuration.architectures = [type(policy.model).__name__]
    if policy.longest is not None:
        fixed_configuration(configuration.get_text_config(), policy.longest)
    configuration.save_pretrained(folder)


def _options(config: Config, device: torch.device, sleeps: bool) -> dict[str, Any]:
    """Options of vLLM's LLM."""
    settings, on_cpu = config.engine, device.type == "cpu"
    dtype = config.model.compute_dtype or config.model.dtype
    cache = settings.kv_cache_bytes or (CPU_CACHE_BYTES if on_cpu else None)
    options = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # a model's own would change what is sampled from
        "logprobs_mode": "processed_logprobs",
        "dtype": dtype if settings.dtype == "auto" else settings.dtype,
        "max_model_len": settings.max_model_len or None,
        "max_num_seqs": config.rollout.batch_size,
        "tensor_parallel_size": settings.tensor_parallel,
        "gpu_memory_utilization": settings.memory_utilization,
        "kv_cache_memory_bytes": cache,
        "enforce_eager": settings.enforce_eager or on_cpu,
        "enable_sleep_mode": sleeps,
    }
    check_ranks(config, local_ranks(), 0 if on_cpu else torch.cuda.device_count())
    if not on_cpu:
        options["device_ids"] = _devices(settings, device)
    if settings.placement == "beside":
        from trainer.engines import vllm_weights

        options |= vllm_weights.options(backend(settings, device))
    return options


def _devices(settings: Settings, device: torch.device) -> list[int]:
    """GPUs of this rank's engine: the trainer's, or its share of those set aside."""
    if not settings.devices and settings.tensor_parallel == 1:
        return [device.index or 0]
    return devices_of(settings, int(os.environ.get("LOCAL_RANK", 0)))


def _pusher(
    llm: Any, policy: Policy, settings: Settings, device: torch.device
) -> Callable[[Iterable[tuple[str, Tensor]]], None]:
    if settings.placement == "beside":
        from trainer.engines import vllm_weights

        return vllm_weights.pusher(llm, backend(settings, device), policy, settings)

    def push(weights: Iterable[tuple[str, Tensor]]) -> None:
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        if device.type == "cpu":
            from trainer.engines.vllm_weights import repack_tied_head

            llm.apply_model(repack_tied_head)

    return push
