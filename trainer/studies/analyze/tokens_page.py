"""A page of responses with every token coloured by its entropy, and a slider of the threshold."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.config import Reward
from trainer.log import Sample
from trainer.report.page import template
from trainer.report.samples import visible

LEVELS = 10
TOKENS_A_RESPONSE = 20_000
"""Longer responses are cut on the page, and say so."""


def write_tokens_page(
    path: Path, samples: Sequence[Sample], threshold: float, title: str, reward: Reward
) -> Path:
    """Write one self-contained HTML page of `samples`; the slider starts at `threshold`, nats.

    `reward` tells which of them are right. The page asks nothing of the network and works offline.
    Entropies that are not finite are shown grey. Returns `path`. Raises ValueError where there is
    no sample.
    """
    if not samples:
        raise ValueError("a page of coloured tokens needs one response or more; got none")
    found = sorted(h for s in samples for h in s.entropy if h is not None and math.isfinite(h))
    # One scale for all: the 98th percentile, lest one odd token bleach the rest.
    top = max(found[int(0.98 * (len(found) - 1))], 0.1) if found else 1.0
    text = template(Path(__file__).with_name("tokens_page.html.jinja")).render(
        title=title,
        threshold=f"{threshold:.4g}",
        greatest=f"{max(found[-1], threshold) if found else 1.0:.4g}",
        top=f"{top:.2g}",
        levels=range(LEVELS + 1),
        responses=[_response(sample, top, reward) for sample in samples],
    )
    path.write_bytes(text.encode("utf-8", "replace"))
    return path


def _response(sample: Sample, top: float, reward: Reward) -> dict[str, Any]:
    pairs = list(zip(sample.tokens, sample.entropy, strict=True))
    return {
        "prompt": visible(sample.prompt),
        "reward": f"{sample.reward:g}",
        "right": reward.is_right(sample.reward),
        "tokens": [_token(text, h, top) for text, h in pairs[:TOKENS_A_RESPONSE]],
        "cut": max(len(pairs) - TOKENS_A_RESPONSE, 0),
    }


def _token(text: str, entropy: float | None, top: float) -> dict[str, str]:
    if entropy is None or not math.isfinite(entropy):
        return {"text": visible(text), "level": "none", "entropy": "", "shown": "not finite"}
    level = str(round(min(max(entropy, 0.0) / top, 1.0) * LEVELS))
    shown = f"{entropy:.3f} nats"
    return {"text": visible(text), "level": level, "entropy": f"{entropy:.4g}", "shown": shown}
