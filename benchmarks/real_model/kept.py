"""What the studies found, as the result files that the page is made of."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.real_model.prompts import KINDS
from benchmarks.real_model.studies import ARMS, SEEDS, Studies
from entropy_kernels._bench.result_text import result_text

FOLDER = Path("benchmarks/results/real_model")
ENGINES = FOLDER / "engines.json"
STEPS, HEAD = "real_step-cpu-*.json", "real_head-cpu-*.json"
WANTED = len(ARMS) * SEEDS
# Rows of the table of tokens at each end, of those sampled this often over all kinds.
TOKENS, MINIMUM = 40, 100
# High tokens of the paper's section 3: contrast, going on, cause, and what derivations begin with.
FORKING = (
    *("wait", "however", "unless", "thus", "also", "since", "because"),
    *("suppose", "assume", "given", "define"),
)
OF_A_KIND = ("count", "mean", "below_0.01", "percentiles", "threshold", "problems", "made")


def runs(studies: Studies) -> int:
    """How many runs of the learning study have ended."""
    if not studies.learned.exists():
        return 0
    return len(json.loads(studies.learned.read_text())["runs"])


def keep(studies: Studies) -> None:
    """Write the result files of all that has ended."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    found = {"learning": studies.learned} if runs(studies) == WANTED else {}
    for one in studies.analyses():
        if one.kind != "patterns" and one.done:
            name = one.kind if one.kind == "temperatures" else f"{one.kind}-{one.of}"
            found[name] = one.file
    for name, path in found.items():
        (FOLDER / f"{name}.json").write_text(result_text(json.loads(path.read_text())))
    patterns = [one for one in studies.analyses() if one.kind == "patterns"]
    if all(one.done for one in patterns):
        kinds = {one.of: json.loads(one.file.read_text()) for one in patterns}
        (FOLDER / "patterns.json").write_text(result_text(joined(kinds)))


def joined(kinds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The patterns of each kind in short, and the tokens of all kinds together."""
    assert kinds.keys() == KINDS.keys()
    counts: defaultdict[int, int] = defaultdict(int)
    sums: defaultdict[int, float] = defaultdict(float)
    texts: dict[int, str] = {}
    for found in kinds.values():
        for token in found["tokens"]:
            counts[token["token"]] += token["count"]
            sums[token["token"]] += token["count"] * token["mean"]
            texts[token["token"]] = token["text"]
    total = sum(found["count"] for found in kinds.values())
    tokens = [
        {
            "text": texts[token],
            "count": count,
            "mean": sums[token] / count,
            "share": count / total,
        }
        for token, count in counts.items()
    ]
    tokens.sort(key=lambda token: -token["mean"])
    often = [token for token in tokens if token["count"] >= MINIMUM]
    return {
        "count": total,
        "mean": sum(found["count"] * found["mean"] for found in kinds.values()) / total,
        "below_0.01": sum(x["count"] * x["below_0.01"] for x in kinds.values()) / total,
        "kinds": {kind: {key: x[key] for key in OF_A_KIND} for kind, x in kinds.items()},
        "cdfs": {kind: x["cdf"] for kind, x in kinds.items()},
        "highest": often[:TOKENS],
        "lowest": often[: -TOKENS - 1 : -1],
        "forking": [_forking(word, tokens) for word in FORKING],
    }


def _forking(word: str, tokens: list[dict[str, Any]]) -> dict[str, Any]:
    """How often a word was sampled, whatever its spaces and capitals; its mean entropy, and the
    share of all tokens whose mean is lower. A word that was not sampled has neither.
    """
    own = [token for token in tokens if token["text"].strip().lower() == word]
    if not own:
        return {"text": word, "count": 0}
    count = sum(token["count"] for token in own)
    mean = sum(token["count"] * token["mean"] for token in own) / count
    lower = sum(token["share"] for token in tokens if token["mean"] < mean)
    return {"text": word, "count": count, "mean": mean, "lower": lower}
