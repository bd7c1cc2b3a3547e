"""What verl's functions take, the replacements and the registered loss take, by the same names."""

import pytest

from entropy_kernels.integrations import verl as adapter
from entropy_kernels.integrations.verl import patch_verl
from tests.integrations import small_verl
from tests.integrations.signatures import (
    assert_same_parameters,
    names_in_docs,
    parameters,
    replacements,
)
from tests.integrations.small_verl import MISSING, config, core_algos

algorithm = pytest.importorskip("verl.trainer.config.algorithm", reason=MISSING)


def test_replacements_take_what_was_taken():
    found = replacements(patch_verl)
    engine = {"prepare_model_inputs", "prepare_model_outputs"}
    others = {"forward", "patch_forward_with_backends", "ppo_loss"}
    assert {name for name, _, _ in found} == engine | others
    for _, theirs, ours in found:
        assert_same_parameters(ours, theirs)


def test_the_engines_step_takes_what_it_took():
    found = replacements(lambda: patch_verl(sets=True))
    assert "forward_step" in {name for name, _, _ in found}
    for _, theirs, ours in found:
        assert_same_parameters(ours, theirs)


def test_the_registered_loss_takes_what_verls_own_takes():
    theirs = parameters(core_algos.get_policy_loss_fn("vanilla"))
    ours = parameters(adapter._HighEntropyLoss.policy_loss)
    assert [name for name, _, _ in ours] == [name for name, _, _ in theirs]


def test_the_docs_name_options_that_verl_has():
    """Settings of the actor, the rollout or its correction, and parameters of a loss."""
    correction = vars(algorithm.RolloutCorrectionConfig())
    actor = small_verl.actor()
    loss = {name for name, _, _ in parameters(core_algos.get_policy_loss_fn("vanilla"))}
    loss |= {name for name, _, _ in parameters(core_algos.agg_loss)} | {"register_policy_loss"}
    assert callable(core_algos.register_policy_loss)
    names = names_in_docs("verl")
    assert len(names) > 15
    for name in names:
        owner = config.RolloutConfig(name="vllm") if ".rollout." in name else actor
        *path, last = name.removeprefix("actor_rollout_ref.rollout.").split(".")
        for part in path:
            owner = getattr(owner, part)
        assert last in correction or last in loss or hasattr(owner, last), name
