"""What the tests of the vLLM engine share."""

import importlib.util

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vllm is not installed; make test-vllm installs it", allow_module_level=True)

# vLLM's own code: an old name of torch's, and sockets that it leaves to the garbage collector.
IGNORED = [
    pytest.mark.filterwarnings("ignore:.torch.distributed.reduce_op:FutureWarning"),
    pytest.mark.filterwarnings("ignore:[Uu]nclosed context:ResourceWarning"),
]
