"""Fields of a rollout_func of TRL's that are missing or do not fit are refused, and so is a loss
that does not read them."""

import math

import pytest

pytest.importorskip("trl", reason="the adapter is for TRL")

from entropy_kernels.integrations import trl as adapter
from entropy_kernels.integrations.trl import patch_trl
from tests.integrations.rollouts import ALL_FIELDS, SampleOneByOne, build, run

# Other projects' deprecations are theirs.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _undone():
    yield
    if adapter._in_force is not None:
        adapter._in_force[1].undo()


WRONG = {
    "no field": (SampleOneByOne(fields=()), "needs a rollout_func that returns sampling_entropies"),
    "too few": (
        SampleOneByOne(changes={"sampling_entropies": [[1.0]] * 8}),
        r"sampling_entropies must have one entry for each .*got \[1, 1",
    ),
    "sets too few": (
        SampleOneByOne(fields=ALL_FIELDS, changes={"sampling_sets": [[[1]]] * 8}),
        r"sampling_sets must have one entry for each .*got \[1, 1",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_fields_that_do_not_fit_are_refused(tmp_path, name):
    rollout, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        run(tmp_path, patch_trl(entropy_source="sampler"), rollout)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_entropies_that_are_none_are_refused(tmp_path, value):
    sampler = SampleOneByOne()

    def rollout(prompts, trainer):
        found = sampler(prompts, trainer)
        found["sampling_entropies"][3][0] = value
        return found

    with pytest.raises(ValueError, match="sampling_entropies must be finite and not negative"):
        run(tmp_path, patch_trl(entropy_source="sampler"), rollout)


@pytest.mark.parametrize("value", [None, math.nan])
def test_missing_log_probs_are_refused(tmp_path, value):
    sampler = SampleOneByOne()

    def rollout(prompts, trainer):
        found = sampler(prompts, trainer)
        found["logprobs"][3][0] = value
        return found

    with pytest.raises(ValueError, match="needs every log-prob; got None or NaN"):
        run(tmp_path, patch_trl(old_logprob="sampler"), rollout)


def test_a_trainer_without_rollout_func_has_no_entropies(tmp_path):
    with patch_trl(entropy_source="sampler"):
        trainer = build(tmp_path, None, top_entropy_quantile=0.2)
        with pytest.raises(ValueError, match=r"needs a rollout_func .* got no extra field"):
            trainer.train()


@pytest.mark.parametrize(
    ("fields", "source"), [(ALL_FIELDS, "current"), (("sampling_entropies",), "sampler")]
)
def test_a_loss_that_knows_nothing_of_the_fields_is_refused(tmp_path, fields, source):
    with patch_trl(entropy_source=source):
        trainer = build(tmp_path, SampleOneByOne(fields=fields, top=3), top_entropy_quantile=0.2)
        trainer._compute_loss = lambda model, inputs: sum(p.sum() for p in model.parameters())
        with pytest.raises(ValueError, match="GRPOTrainer has a _compute_loss of its own"):
            trainer.train()


def test_unknown_sources_are_refused():
    with pytest.raises(ValueError, match="entropy_source must be one of current, sampler; got"):
        patch_trl(entropy_source="old")
    with pytest.raises(ValueError, match="old_logprob must be one of recomputed, sampler; got"):
        patch_trl(old_logprob="current")
