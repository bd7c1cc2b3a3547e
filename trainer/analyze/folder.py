"""Where the results of an analysis lie."""

import re
from pathlib import Path


def out_folder(model: str) -> str:
    """`analyses/` and the model's name, for a folder that was not named."""
    return str(Path("analyses") / re.sub(r"[^\w.-]+", "-", model).strip("-."))
