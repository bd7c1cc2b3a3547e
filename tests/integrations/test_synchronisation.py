"""What the adapters make a GPU's host wait for: nothing in forward, and in backward what is told.

T tokens, B sequences, L their length.
"""

from contextlib import ExitStack
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from entropy_kernels.integrations import _lm_head, _trl_step, hf, trl, verl
from entropy_kernels.integrations.liger import LinearScaledCrossEntropy
from tests.gpu_options import B, L, T, bools, floats, make_head
from tests.host_waits import HostWaits, backward, fake_gpu
from tests.integrations import small_models
from tests.test_no_synchronisation import count

# A GPU without recorded kernels; whatever "auto" takes there, nothing may wait.
pytestmark = pytest.mark.filterwarnings("ignore:linear_logprob_entropy takes:RuntimeWarning")

# None of them knows a bound of the rows with a gradient.
OF_BACKWARD = {"nonzero at _rows.py"}


def files(run) -> set[str]:
    return {key.rpartition(":")[0] for key in count(run)}


def test_trl():
    with fake_gpu(), HostWaits() as forward:
        head = make_head(T)
        given = head.hidden, head.weight, None, head.target, 0.7, 64
        outputs = "log_probs", "entropy", "log_sum_sq_probs"
        logprob, *_ = trl.LogProbFunction().apply(*given, outputs=outputs)
        assert forward.found == {}
        assert files(lambda: backward(logprob.sum())) == OF_BACKWARD
        trainer = SimpleNamespace(is_in_train=False, top_entropy_quantile=0.2)
        given = trainer, floats(B, L), bools(B, L).int(), 0.8
        assert files(lambda: _trl_step.high_entropy_mask_of_step(*given)) == set()


def test_verl():
    with fake_gpu(), HostWaits() as forward:
        head = make_head(B, L)
        rollout = verl.Rollout(False, False, torch.where)
        forward_of_head = verl._head("triton", rollout, verl.Squares(rollout))
        logprob, _ = forward_of_head(None, head.hidden, head.weight, head.target, floats(B, L))
        assert forward.found == {}
        assert files(lambda: backward(logprob.sum())) == {"item at launch_rows.py"}
        options = {
            "fraction": 0.2,
            "denominator": "selected",
            "over_ranks": False,
            "entropy_source": "current",
            "sets": False,
            "impl": "triton",
        }
        losses = SimpleNamespace(ppo_loss=None, no_padding_2_padding=None)
        loss = verl._HighEntropyLoss(losses, options)
        loss._entropy = floats(B, L)
        config = SimpleNamespace(clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=0.28)
        config.get, config.global_batch_info = lambda name, other: other, {"batch_num_tokens": T}
        given = floats(B, L), logprob.detach(), floats(B, L), bools(B, L).int()
        # verl takes metrics as numbers.
        assert files(lambda: loss.policy_loss(*given, config=config)) == {"item at verl.py"}


@pytest.mark.parametrize("ids", [False, True])
def test_liger(ids):
    with fake_gpu():
        head = make_head(T)
        chosen = torch.zeros(3, dtype=torch.int64, device="cuda") if ids else None
        given = head.hidden, head.weight, head.target, 0.7, -100, 1, True, chosen
        # Liger reads the ids as well.
        expected = {"item at liger.py"} if ids else set()
        assert files(lambda: LinearScaledCrossEntropy.apply(*given)) == expected
        if not ids:
            nll, _ = LinearScaledCrossEntropy.apply(*given)
            assert files(lambda: backward(nll.sum())) == OF_BACKWARD


def test_transformers():
    """A model of fake weights is no model to measure, and its head's weight no plain tensor."""
    with fake_gpu(), torch.device("cuda"), ExitStack() as stack:
        stack.enter_context(patch.object(_lm_head, "measure", lambda *_: (1.0, 30.0)))
        stack.enter_context(patch.object(_lm_head, "parts", lambda _: None))
        as_linear = lambda head, hidden: (hidden, head.weight, head.bias)  # noqa: E731
        stack.enter_context(patch.object(_lm_head, "as_linear", as_linear))
        model, ids = small_models.build("llama"), torch.zeros(B, L, dtype=torch.int64)
        stack.enter_context(hf.patch_lm_head(model))
        with HostWaits() as forward:
            found = model(ids, target=ids, temperature=0.7, statistics=("max_prob",))
        assert forward.found == {}
        assert files(lambda: backward(found.logprob.sum())) == OF_BACKWARD
