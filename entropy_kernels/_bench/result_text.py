"""How every result file is written: as JSON, with a series of numbers on one line."""

import json
from typing import Any


def result_text(value: Any) -> str:
    """JSON text of `value`. A list or an object that holds no other takes one line."""
    return _text(value, "\n") + "\n"


def _text(value: Any, new_line: str) -> str:
    """`new_line` starts a line at the depth of `value`."""
    members = value.values() if isinstance(value, dict) else value
    if not isinstance(value, dict | list | tuple) or not any(map(_is_filled, members)):
        return json.dumps(value)
    inner = new_line + " "
    if isinstance(value, dict):
        lines = [f"{json.dumps(str(name))}: {_text(x, inner)}" for name, x in value.items()]
        return f"{{{inner}{f',{inner}'.join(lines)}{new_line}}}"
    return f"[{inner}{f',{inner}'.join(_text(x, inner) for x in value)}{new_line}]"


def _is_filled(value: Any) -> bool:
    return isinstance(value, dict | list | tuple) and bool(value)
