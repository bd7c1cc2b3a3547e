"""What the tests of the vLLM engine share."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.small import settings
from trainer.config import Config, Engine, Eval

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vllm is not installed; make test-vllm installs it", allow_module_level=True)

# vLLM's own code: an old name of torch's, and sockets that it leaves to the garbage collector.
IGNORED = [
    pytest.mark.filterwarnings("ignore:.torch.distributed.reduce_op:FutureWarning"),
    pytest.mark.filterwarnings("ignore:[Uu]nclosed context:ResourceWarning"),
]


# A width of heads that vLLM has on a CPU, and positions for two blocks of its cache and more.
SHAPE = {"hidden_size": 64, "head_dim": 32, "max_position_embeddings": 512}


def configure(root: Path, placement: str, **changes: Any) -> Config:
    """A run that evaluates every two steps."""
    engine = Engine(kind="vllm", placement=placement, kv_cache_bytes=2**26)
    return settings(
        root, engine=engine, **{"steps": 4, "eval": Eval(every=2, problems=4)} | changes
    )
