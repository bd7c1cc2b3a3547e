"""A checkpoint of a run, by any number of ranks, as a plain transformers folder."""

import secrets
import shutil
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from tyro.conf import Positional

from trainer import checkpoint
from trainer.checkpoint import sharded
from trainer.errors import naming
from trainer.launch.lock import owned
from trainer.model.folder import copy_settings, save_model
from trainer.ranks import Ranks

_ALONE = Ranks(torch.device("cpu"))


def export(
    run: Positional[Path],
    out: Positional[Path],
    step: int | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
) -> Path:
    """Write the policy of a run into a folder that transformers and vLLM load.

    On the CPU, in one process, with one copy of the weights in memory. Configuration, generation
    and tokenizer are those that the run was given, byte for byte except for the weights' dtype. The
    folder appears when it is whole.

    Args:
        run: The run's folder.
        out: The folder to write, which must be missing or empty.
        step: The step of the checkpoint; by default the newest whole one.
        dtype: The dtype of the weights, rounded to nearest; by default the run's.

    Raises:
        ValueError: there is no such checkpoint or it is damaged, `out` has files, or another export
            writes it.
    """
    found = checkpoint.find(run, step, _ALONE)
    with owned(out, beside=True):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out} is not empty; choose another folder")
        unfinished = out.with_name(f".{out.name}.unfinished-{secrets.token_hex(4)}")
        try:
            with naming(out):
                _write(found, unfinished, dtype)
                unfinished.rename(out)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return out


def _write(found: Path, folder: Path, dtype: str | None) -> None:
    config = AutoConfig.from_pretrained(found)
    kind = getattr(torch, dtype) if dtype else config.dtype
    model = AutoModelForCausalLM.from_config(config, dtype=kind)
    sharded.read(sharded.weights(model), found, _ALONE)
    save_model(folder, model)
    copy_settings(found, folder, model)
