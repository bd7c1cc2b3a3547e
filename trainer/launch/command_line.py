"""Arguments turned into a configuration: `[PRESET] [--config FILE] [--X.Y ...]`.

An option overrides the file, and the file the preset, whatever their order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from trainer.config import Config
from trainer.config.files import File, checked, fill, read
from trainer.presets import PRESETS

DEFAULT_PRESET = "tiny"
HELP = (
    "--config FILE reads settings from a TOML, YAML or JSON file, from the run.json of a run, or "
    "from a run's folder; a file may name its preset. Options override the file, and the file "
    "overrides the preset."
)

TRAIN = (
    "Train a run, from its last checkpoint if its folder has one. Settings that only shape how it "
    "runs may then differ, such as micro-batches, engine, threads and evaluations. Other changes "
    "need --allow-changes. All changes are printed and noted in run.json."
)


@dataclass(frozen=True)
class Train:
    """The options of `train`."""

    print_config: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print all settings as a file for --config, and end."""
    allow_changes: tuple[str, ...] = ()
    """Settings, or groups of them, that may differ from now on although a run usually keeps them,
    such as rollout.max_new_tokens."""
    branch: str = ""
    """RUN, RUN@STEP or a checkpoint, from which a new run under another --name begins. It inherits
    weights, optimizer, metrics and place in the data; without a preset or file the settings too."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


def parse_train(arguments: Sequence[str]) -> Train:
    """The options of `train` in `arguments`; errors as in `parse`."""
    preset, path, options = split(arguments)
    origin = _value(options, "--branch")
    if origin and not preset and not path:
        from trainer.checkpoint.branch import find_origin

        arguments = ["--config", str(find_origin(origin).run), *options]
    return parse(arguments, "python -m trainer train", TRAIN, lambda config: Train(config=config))


def parse(
    arguments: Sequence[str],
    prog: str,
    description: str = "",
    around: Callable[[Config], Any] = lambda config: config,
) -> Any:
    """What `around` makes of the configuration, a dataclass, with the options in `arguments`.

    `around` puts the configuration of preset and file, as yet unchecked, into the dataclass whose
    fields are the command's options. By default that is the configuration itself.

    Raises:
        ValueError: an unknown preset; as `files.read`; settings that cannot be meant together.
        SystemExit: an option that is unknown or of another type, and after --help.
    """
    preset, path, options = split(arguments)
    file = read(Path(path)) if path else None
    config, name = base(preset, file)
    title = " ".join([prog, *([name] if name else [])])
    default = around(config)
    if not options and file is not None:
        try:
            return checked(default)
        except ValueError as error:
            raise ValueError(f"{file.path}: {error}") from error
    text = f"{description} {HELP} Presets: {', '.join(PRESETS)}."
    return checked(
        tyro.cli(type(default), default=default, args=options, prog=title, description=text)
    )


def split(arguments: Sequence[str]) -> tuple[str, str, list[str]]:
    """The preset and the file that `arguments` name, "" for none, and the other arguments.

    Raises:
        ValueError: --config twice, or without a file.
    """
    rest = list(arguments)
    preset = rest.pop(0) if rest and not rest[0].startswith("-") else ""
    paths, options = [], []
    while rest:
        argument = rest.pop(0)
        name, has_value, value = argument.partition("=")
        if name != "--config":
            options.append(argument)
        elif not has_value and (not rest or rest[0].startswith("-")):
            raise ValueError("--config needs a file or a run's folder")
        else:
            paths.append(value if has_value else rest.pop(0))
    if len(paths) > 1:
        raise ValueError(f"--config takes one file; got {', '.join(paths)}")
    return preset, "".join(paths), options


def _value(options: Sequence[str], name: str) -> str:
    """The value of the option `name`; "" if it is not given."""
    for i, option in enumerate(options):
        if option == name and i + 1 < len(options):
            return options[i + 1]
        if option.startswith(name + "="):
            return option.partition("=")[2]
    return ""


def base(preset: str, file: File | None) -> tuple[Config, str]:
    """The settings before options, unchecked, and the preset that they begin with, "" for none.

    Raises:
        ValueError: an unknown preset, or two.
    """
    if file is not None and file.preset:
        if preset not in ("", file.preset):
            raise ValueError(f"{file.path} has the preset {file.preset!r}, the command {preset!r}")
        preset = file.preset
    if preset and preset not in PRESETS:
        where = f"{file.path}: " if file is not None and file.preset else ""
        raise ValueError(f"{where}no preset {preset!r}; there are {', '.join(PRESETS)}")
    # What a run had before a setting was there is the setting's own default.
    if not preset and not (file is not None and file.whole):
        preset = DEFAULT_PRESET
    config = PRESETS[preset]() if preset else Config()
    return (fill(config, file.values) if file is not None else config), preset
