"""Two temperatures in vLLM: its V1 runner against the model, V2's calls against plain ones."""

from types import SimpleNamespace

import pytest
import torch

from tests.trainer.small import build_model, build_tokenizer, settings
from tests.trainer.vllm_cases import IGNORED, SHAPE  # first: it skips where vLLM is missing
from trainer.config import Engine, Rollout
from trainer.engines.transformers import TransformersEngine
from trainer.policy import Policy
from trainer.studies.two_temperature_engines import VllmTwoTemperatures
from trainer.studies.two_temperatures import TwoTemperatures, temper
from trainer.studies.vllm_two_temperatures import TwoTemperaturesProcessor

from vllm import SamplingParams  # isort: skip
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality  # isort: skip

pytestmark = IGNORED
PROMPTS = [[3, 4, 13, 5, 14], [7], list(range(3, 15)) * 2]
ASKED = {"threshold": 0.9, "low": 0.5, "high": 2.0}


def parameters(asked, temperature=1.0):
    extra = None if asked is None else {"two_temperatures": asked}
    return SamplingParams(temperature=temperature, extra_args=extra)


@pytest.fixture
def logits():
    return torch.randn(4, 17, generator=torch.Generator().manual_seed(0)) * 2


def tempered(logits, *rows):
    wanted = logits.clone()
    wanted[list(rows)] = temper(logits[list(rows)], **ASKED)
    return wanted


def test_requests_of_runner_v1_keep_their_temperatures_as_they_move(logits):
    processor = TwoTemperaturesProcessor(None, torch.device("cpu"), False)
    assert processor.apply(logits) is logits
    added = [(row, parameters(ASKED if row == 1 else None), None, []) for row in range(4)]
    processor.update_state(BatchUpdate(4, [], added, []))
    torch.testing.assert_close(processor.apply(logits), tempered(logits, 1))
    processor.update_state(None)
    processor.update_state(BatchUpdate(4, [], [], [(1, 3, MoveDirectionality.SWAP)]))
    torch.testing.assert_close(processor.apply(logits), tempered(logits, 3))
    processor.update_state(BatchUpdate(3, [0], [], [(3, 0, MoveDirectionality.UNIDIRECTIONAL)]))
    torch.testing.assert_close(processor.apply(logits[:3]), tempered(logits[:3], 0))
    processor.update_state(BatchUpdate(2, [0], [], []))
    assert processor.apply(logits) is logits


def test_rows_of_runner_v2_have_the_temperatures_of_their_slots(logits):
    processor = TwoTemperaturesProcessor(None, SimpleNamespace(device=torch.device("cpu")))
    assert processor.add_request(5, parameters(ASKED))
    assert not processor.add_request(2, parameters(None))
    context = SimpleNamespace(expanded_idx_mapping=torch.tensor([5, 2, 9, 5]))
    torch.testing.assert_close(processor.apply(logits, context), tempered(logits, 0, 3))
    assert not processor.add_request(5, parameters(None))
    assert processor.apply(logits, context) is logits


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(parameters(ASKED, 0.7), id="a third temperature"),
        pytest.param(parameters({"low": 1.0}), id="numbers missing"),
        pytest.param(parameters(ASKED | {"low": -1.0}), id="negative"),
    ],
)
def test_bad_requests_are_refused(bad):
    TwoTemperaturesProcessor.validate_params(parameters(None, 0.7))
    TwoTemperaturesProcessor.validate_params(parameters(ASKED))
    with pytest.raises(ValueError, match=r"two_temperatures|must be finite"):
        TwoTemperaturesProcessor.validate_params(bad)


def test_vllm_samples_from_the_distribution_of_two_temperatures(tmp_path):
    """Its log-probs are those of the tempered logits of the model, token by token."""
    policy = Policy(build_model("qwen3", spread=0.4, **SHAPE), build_tokenizer())
    config = settings(
        tmp_path,
        engine=Engine(kind="vllm", kv_cache_bytes=2**26),
        rollout=Rollout(batch_size=8),
    )
    two = TwoTemperatures(**ASKED)
    engine = VllmTwoTemperatures(policy, config, policy.device, two)
    engine.update_weights(policy.weights())
    used = set()
    found = engine.sample(PROMPTS, [1, 2, 3], max_new_tokens=24, temperature=1.0)
    for prompt, one in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([prompt + one.tokens.tolist()])
        with torch.no_grad():
            logits = policy.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        want = torch.distributions.Categorical(logits=two(None, logits))
        torch.testing.assert_close(one.logprobs, want.log_prob(one.tokens), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(one.entropies, want.entropy(), atol=1e-4, rtol=1e-4)
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        used |= set((entropy > two.threshold).tolist())
    assert used == {False, True}
    engine.two = TwoTemperatures(0.9, 0.0, 0.0)
    got = engine.sample(PROMPTS, [1, 2, 3], max_new_tokens=12, temperature=1.0)
    want = TransformersEngine(policy, 8).sample(
        PROMPTS, [1, 2, 3], max_new_tokens=12, temperature=0.0
    )
    assert [x.tokens.tolist() for x in got] == [x.tokens.tolist() for x in want]
    with pytest.raises(ValueError, match="must be 1"):
        engine.sample(PROMPTS, [1, 2, 3], max_new_tokens=12, temperature=0.5)
    engine.close()
