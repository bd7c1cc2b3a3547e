"""The model whose forward is running: of a head's function that is handed a weight alone."""

import sys
from types import FrameType
from typing import Any

from transformers import PreTrainedModel


def running_model(function: str) -> Any:
    """`self` of the innermost running method called `function`, a transformers model; or None.

    TRL and verl look up the function that computes their head, and hand it `lm_head.weight`. Only
    their caller's frame knows what else the head is, and what the model makes of it. Compiled code
    is resumed under a name that contains the method's.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if function in frame.f_code.co_name:
            model = frame.f_locals.get("self")
            if isinstance(model, PreTrainedModel):
                return model
        frame = frame.f_back
    return None
