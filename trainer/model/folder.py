"""A transformers folder or hub name read as model and tokenizer, and its settings saved again."""

import difflib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import cached_file

from trainer import config

CONFIG = "config.json"
# Beside it and what the tokenizer names; weights are none of these.
SETTINGS = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
)
NEAR = 3  # names in an error
Files = dict[str, bytes]


def read_folder(settings: config.Model, *, empty: bool) -> tuple[Any, Any, Files]:
    """Model and tokenizer of `settings.path`, on the CPU, and the files of their settings.

    With `empty` weights are on "meta", without values. The tokenizer pads, on the left, with
    end-of-sequence where it has no padding: in memory alone.

    Raises:
        ValueError: in one line, what is missing or damaged, and what is near.
    """
    try:
        path = _existing(settings.path)
        with _quiet_hub():
            architecture = AutoConfig.from_pretrained(path)
            model = _model(path, architecture, settings, empty)
            tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # what reads a stranger's files raises anything
        raise ValueError(
            f"no model can be loaded from model.path {settings.path!r}: {_line(error)}"
        ) from error
    _check_tokenizer(settings.path, tokenizer, model)
    files = _settings(Path(cached_file(path, CONFIG)).parent, tokenizer)
    if type(model.config) is not type(architecture):
        del files[CONFIG]  # of a model of which this is a part
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer, files


def write_settings(folder: Path, model: Any, tokenizer: Any, files: Files) -> None:
    """Write into `folder` all but the weights. `files` are kept, except for the model's class and
    dtype; others are as transformers saves them."""
    # fully_shard puts its own prefix to the name of the class.
    name, dtype = type(model).__name__.removeprefix("FSDP"), model.dtype
    if CONFIG not in files:
        own = type(model.config).from_dict(model.config.to_dict())
        own.architectures, own.dtype = [name], dtype
        own.save_pretrained(folder)
    if "generation_config.json" not in files:
        model.generation_config.save_pretrained(folder)
    if "tokenizer_config.json" not in files:
        tokenizer.save_pretrained(folder)
    for path, contents in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(contents)
    if CONFIG in files:
        said = json.loads(files[CONFIG])
        said.pop("torch_dtype", None)  # its older name
        said |= {"architectures": [name], "dtype": str(dtype).removeprefix("torch.")}
        (folder / CONFIG).write_text(json.dumps(said, indent=2) + "\n", "utf-8")


def save_model(folder: Path, model: Any) -> None:
    """Save what `save_pretrained` writes, except the settings of generation: it refuses some that
    it has read."""
    generation = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        model.save_pretrained(folder)
    finally:
        model.generation_config = generation


def copy_settings(source: Path, folder: Path, model: Any) -> None:
    """Copy the settings of one transformers folder to another, as `write_settings` does."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    write_settings(folder, model, tokenizer, _settings(source, tokenizer))


def _settings(folder: Path, tokenizer: Any) -> Files:
    names = {CONFIG, *SETTINGS, *tokenizer.vocab_files_names.values()}
    more = folder.glob("additional_chat_templates/*.jinja")
    paths = [*(folder / name for name in sorted(names)), *sorted(more)]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths if p.is_file()}


def _model(path: str, architecture: Any, settings: config.Model, empty: bool) -> Any:
    dtype = getattr(torch, settings.dtype)
    options = {"dtype": dtype, "attn_implementation": settings.attention}
    if empty:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(architecture, **options).eval()
        model.tie_weights()
        model.generation_config = GenerationConfig.from_pretrained(path)
        return model
    model, found = AutoModelForCausalLM.from_pretrained(
        path,
        config=architecture,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **options,
    )
    # transformers makes them up.
    other = [f"{name} of shape {tuple(got)}" for name, got, _ in found["mismatched_keys"]]
    if lost := sorted(found["missing_keys"]) + sorted(other):
        raise ValueError(f"{_list(lost)} is missing or of another shape among its weights")
    return model


def _existing(path: str) -> str:
    """`path`, if it is a model's folder or may be a hub name."""
    local = Path(path).expanduser()
    if local.is_dir():
        _check_folder(path, local)
        return str(local)
    if local.exists():
        raise ValueError("it is a file, and wanted is a folder or a hub name")
    parts, near = Path(path).parts, _near(local)
    if not path.startswith((".", "~", "/")) and (
        (len(parts) == 1 and not near) or (len(parts) == 2 and not Path(parts[0]).is_dir())
    ):
        return path
    raise ValueError(f"there is no such folder; near it: {', '.join(near) or 'none'}")


def _near(missing: Path) -> list[str]:
    """Folders with the most similar names, beside the first missing part of the path."""
    parent = next(p for p in missing.parents if p.is_dir())
    name = missing.relative_to(parent).parts[0]
    names = sorted(p.name for p in parent.iterdir() if p.is_dir() and not p.name.startswith("."))
    return [str(parent / n) for n in difflib.get_close_matches(name, names, NEAR)]


def _check_folder(path: str, folder: Path) -> None:
    if (folder / CONFIG).is_file():
        return
    if (folder / "run.json").is_file() or (folder / "checkpoints").is_dir():
        steps = sorted((folder / "checkpoints").glob("step-*"))
        inside = f", or name {steps[-1]}" if steps else "; it has no checkpoint yet"
        raise ValueError(
            f"it is the folder of a run: `python -m trainer export {path} FOLDER` makes a model of "
            f"it{inside}"
        )
    held = _list(sorted(p.name for p in folder.iterdir())) or "nothing"
    raise ValueError(f"it has no {CONFIG}, so it is no model's folder; it holds {held}")


def _check_tokenizer(path: str, tokenizer: Any, model: Any) -> None:
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {path} has no end-of-sequence token; it needs one")
    rows = model.get_input_embeddings().weight.shape[0]
    beyond = [(i, token) for token, i in tokenizer.get_vocab().items() if i >= rows]
    if beyond:
        largest, token = max(beyond)
        raise ValueError(
            f"the tokenizer of {path} has tokens that the model has not: {len(beyond)}, up to "
            f"{token!r} with id {largest}, for {rows} rows of its embedding"
        )


def _line(error: Exception) -> str:
    """The first line of a text."""
    said = " ".join(str(error).partition("\n")[0].split())
    return said if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {said}"


def _list(names: list[str]) -> str:
    more = len(names) - NEAR
    return ", ".join(names[:NEAR]) + (f" and {more} more" if more > 0 else "")


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Silence the hub's five tries on stderr if it cannot be reached."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
