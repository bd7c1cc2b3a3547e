"""What TRL's functions take, the replacements take, from a trainer and from any other caller."""

import dataclasses
import math
from unittest.mock import Mock

import pytest
import torch

pytest.importorskip("trl", reason="the adapter is for TRL")

from trl import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from entropy_kernels.integrations import _trl_rollout, _trl_step
from entropy_kernels.integrations.trl import patch_trl
from tests.integrations.signatures import assert_same_parameters, names_in_docs, replacements


def test_replacements_take_what_was_taken():
    found = {
        name: (theirs, ours) for name, theirs, ours in replacements(lambda: patch_trl(scope="step"))
    }
    function, ours = found.pop("_ChunkedLogProbFunction")
    assert_same_parameters(ours.apply, function.forward)
    assert set(found) == {"_use_triton", "get_high_entropy_mask", *_trl_rollout._METHODS}
    for theirs, ours in found.values():
        assert_same_parameters(ours, theirs)


def test_the_docs_name_options_that_trl_has():
    names = names_in_docs("TRL")
    assert len(names) > 15
    assert set(names) <= {field.name for field in dataclasses.fields(GRPOConfig)}


def trainer_of_no_run():
    """As TRL's own tests of the method have one: the class's attributes, of the object none."""
    trainer = Mock(spec=GRPOTrainer)
    trainer.accelerator = Mock(num_processes=1)
    trainer.accelerator.gather = lambda x: x
    trainer.accelerator.pad_across_processes = lambda x, dim, pad_index: x
    return trainer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threshold", [0, 0.5, 0.75, 0.8, 0.9, 1.0])
def test_a_caller_that_trains_nothing(threshold, dtype):
    """Its call is the batch; at these thresholds k is also the number that TRL's quantile keeps."""
    entropies = torch.randperm(41).float().to(dtype).reshape(1, 41)
    mask = torch.ones(1, 41, dtype=torch.long)
    trainer, select = trainer_of_no_run(), GRPOTrainer.get_high_entropy_mask
    with patch_trl(scope="step"):
        keep = GRPOTrainer.get_high_entropy_mask(
            trainer, entropies=entropies, mask=mask, threshold=threshold
        )
        none = GRPOTrainer.get_high_entropy_mask(trainer, entropies, mask * 0, threshold)
    assert int(keep.sum()) == max(1, math.ceil(round((1 - threshold) * 41, 9)))
    assert torch.equal(keep, select(trainer, entropies, mask, threshold))
    assert not none.any()


def test_thresholds_of_rounded_fractions():
    """1 - (1 - f) is not f; k must not be one more for it."""
    entropies, mask = torch.arange(490.0)[None], torch.ones(1, 490)
    trainer = trainer_of_no_run()
    for k in range(1, 490):
        threshold = 1 - k / 490
        trainer.top_entropy_quantile = k / 490
        assert _trl_step.high_entropy_mask_of_step(trainer, entropies, mask, threshold).sum() == k
    del trainer.top_entropy_quantile
    for tenths in range(1, 10):
        keep = _trl_step.high_entropy_mask_of_step(trainer, entropies, mask, 1 - tenths / 10)
        assert keep.sum() == 49 * tenths


@pytest.mark.parametrize("threshold", [-0.1, 1.5, math.nan])
def test_a_threshold_that_is_no_quantile_is_refused(threshold):
    with pytest.raises(ValueError, match=r"threshold must be a quantile in \[0, 1\]; got"):
        _trl_step.high_entropy_mask_of_step(
            trainer_of_no_run(), torch.rand(1, 9), torch.ones(1, 9), threshold
        )
