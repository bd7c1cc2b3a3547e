"""What verl's functions take, the replacements and the registered loss take, by the same names."""

import pytest

from entropy_kernels.integrations import verl as adapter
from entropy_kernels.integrations.verl import patch_verl
from tests.integrations.signatures import assert_same_parameters, parameters, replacements

MISSING = "verl is not installed"
core_algos = pytest.importorskip("verl.trainer.ppo.core_algos", reason=MISSING)


def test_replacements_take_what_was_taken():
    found = replacements(patch_verl)
    assert {name for name, _, _ in found} == {"forward", "patch_forward_with_backends", "ppo_loss"}
    for _, theirs, ours in found:
        assert_same_parameters(ours, theirs)


def test_the_registered_loss_takes_what_verls_own_takes():
    theirs = parameters(core_algos.get_policy_loss_fn("vanilla"))
    ours = parameters(adapter._HighEntropyLoss.policy_loss)
    assert [name for name, _, _ in ours] == [name for name, _, _ in theirs]
