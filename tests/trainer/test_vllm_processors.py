"""Our recording processor under calls of vLLM's runners: V2's without its runner."""

import dataclasses
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from entropy_kernels.integrations import vllm as entropies
from entropy_kernels.integrations._vllm_records import decode
from entropy_kernels.sampling import entropy_from_logits, truncate
from tests.trainer.vllm_cases import IGNORED  # first: it skips where vLLM is missing

from entropy_kernels.integrations.vllm_processors import EntropyProcessor  # isort: skip
from vllm import SamplingParams  # isort: skip
from vllm.exceptions import VLLMValidationError  # isort: skip
from vllm.outputs import SamplingMask  # isort: skip
from vllm.v1.outputs import SamplingMaskLists  # isort: skip
from vllm.v1.sample.logits_processor import (  # isort: skip
    BatchUpdate,
    MoveDirectionality,
    validate_logits_processors_parameters,
)
from vllm.v1.worker.gpu.sample.logits_processor import (  # isort: skip
    LogitsContext,
    LogitsProcRequestState,
    build_custom_logits_processors_params_validator,
)

pytestmark = IGNORED
VOCABULARY, SLOTS = 17, 4
CPU = torch.device("cpu")
SHARDED = SimpleNamespace(enable_batch_sharded_sampling=False)
CONFIG = SimpleNamespace(
    parallel_config=SHARDED, scheduler_config=SimpleNamespace(max_num_seqs=SLOTS)
)


def logits_of(request, position):
    """What the model says of a token, whenever it is asked."""
    generator = torch.Generator().manual_seed(1000 * request + position)
    return 3 * torch.randn(VOCABULARY, generator=generator)


@dataclasses.dataclass
class Request:
    """One that is sampled until it has `length` tokens."""

    number: int
    prompt: int
    length: int
    params: SamplingParams
    slot: int | None = None
    done: int = 0  # tokens of the response
    read: int = 0  # tokens of prompt and response in the cache

    @property
    def to_read(self):
        return self.prompt + self.done


class RunnerV2:
    """Slots, chunks, drafts and preemption as vLLM's runner V2 has them, in any order of rows."""

    def __init__(self, rng, drafts=0):
        lengths = [SimpleNamespace(np=np.zeros(SLOTS, dtype=np.int32)) for _ in range(2)]
        self.states = LogitsProcRequestState(CPU, SLOTS, VOCABULARY, None, *lengths, None)
        speculative = SimpleNamespace(num_speculative_tokens=drafts) if drafts else None
        config = SimpleNamespace(**vars(CONFIG), speculative_config=speculative)
        self.processor = EntropyProcessor(config, self.states)
        self.free = list(range(SLOTS))
        self.rng, self.drafts = rng, drafts
        self.preempted = self.chunks = self.rejected = 0

    def add(self, request):
        request.slot, request.read = self.free.pop(), 0
        self.states.prompt_len.np[request.slot] = request.prompt
        self.states.prefill_len.np[request.slot] = request.to_read
        asks = self.processor.add_request(request.slot, request.params)
        assert asks == bool(request.params.extra_args)
        self.processor.apply_staged_writes()

    def remove(self, request):
        self.free.append(request.slot)
        request.slot = None

    def step(self, running):
        """One token more for each, or some of the prompt; the logits before and after."""
        rows, upper = [], []
        self.rng.shuffle(running)
        for request in running:
            left = request.to_read - request.read
            if left > 1 and self.rng.random() < 0.5:
                chunk = self.rng.randint(1, left - 1)
                rows.append((request, request.read + chunk - 1, torch.randn(VOCABULARY)))
                request.read += chunk
                self.chunks += 1
            else:
                drafts = self.rng.randint(0, self.drafts) if left == 1 else 0
                accepted = self.rng.randint(0, drafts)
                self.rejected += drafts - accepted
                for draft in range(drafts + 1):
                    true = logits_of(request.number, request.done + draft)
                    logits = true if draft <= accepted else torch.randn(VOCABULARY)
                    rows.append((request, request.to_read - 1 + draft, logits))
                request.read, request.done = request.to_read + accepted, request.done + accepted + 1
            upper.append(max(pos for one, pos, _ in rows if one is request) + 1)
        slots = [request.slot for request in running]
        context = LogitsContext(
            expanded_idx_mapping=torch.tensor([x.slot for x, *_ in rows], dtype=torch.int32),
            idx_mapping=torch.tensor(slots),
            idx_mapping_np=np.array(slots),
            expanded_local_pos=None,
            input_ids=None,
            pos=torch.tensor([pos for _, pos, _ in rows]),
            seq_lens_upper_bound_np=np.array(upper),
        )
        logits = torch.stack([z for *_, z in rows])
        return logits.clone(), self.processor.apply(logits, context)

    def serve(self, requests):
        waiting, running = list(requests), []
        while waiting or running:
            while waiting and self.free:
                running.append(waiting.pop(0))
                self.add(running[-1])
            yield self.step(running)
            for request in list(running):
                if request.done >= request.length:
                    running.remove(request)
                    self.remove(request)
                elif self.rng.random() < 0.1:
                    self.preempted += 1
                    running.remove(request)
                    self.remove(request)
                    waiting.insert(0, request)

    def take(self, requests):
        keys, lengths = [x.number for x in requests], [x.done for x in requests]
        return decode([self.processor.records.read(keys, lengths)], keys, lengths)


def requests_of(rng, sets):
    requests = []
    for number in range(24):
        params = SamplingParams(temperature=rng.choice([0, 0.3, 0.7, 1.0, 2.0]))
        if number % 5 != 4:
            if sets and number % 3:
                params.top_k, params.top_p = rng.choice([(0, 0.9), (5, 1.0), (5, 0.8), (1, 0.5)])
            params = entropies.recorded(params, number, sets=sets)
        requests.append(Request(number, rng.randint(1, 9), rng.randint(1, 20), params))
    return requests


@pytest.mark.parametrize("drafts", [0, 3])
def test_entropies_of_runner_v2_are_those_of_each_token(drafts):
    rng = random.Random(drafts)
    runner, requests = RunnerV2(rng, drafts), requests_of(rng, sets=False)
    for before, after in runner.serve(requests):
        assert after.equal(before)
    assert runner.preempted > 3
    assert runner.chunks > 3
    assert bool(drafts) == (runner.rejected > 3)
    asking = [x for x in requests if x.params.extra_args]
    for request, (found, kept) in zip(asking, runner.take(asking), strict=True):
        logits = torch.stack([logits_of(request.number, i) for i in range(request.done)])
        want = entropy_from_logits(logits, request.params.temperature or 1.0)
        torch.testing.assert_close(found, want, atol=1e-6, rtol=0)
        assert kept is None
    runner.processor.records.forget([x.number for x in asking])
    assert not runner.processor.records._by_key


def test_sets_of_runner_v2_are_those_of_each_token():
    rng = random.Random(5)
    runner, requests = RunnerV2(rng), requests_of(rng, sets=True)
    for before, after in runner.serve(requests):
        assert (after.equal(before)) or bool((after == -torch.inf).any())
        assert after[after > -torch.inf].equal(before[after > -torch.inf])
    asking = [x for x in requests if x.params.extra_args]
    for request, (found, kept) in zip(asking, runner.take(asking), strict=True):
        logits = torch.stack([logits_of(request.number, i) for i in range(request.done)])
        asked = request.params.extra_args["entropy_kernels"]
        limits = {name: asked[name] for name in ("top_k", "top_p", "min_p")}
        cuts = request.params.temperature > 0 and request.number % 3 > 0
        want = truncate(logits, request.params.temperature or 1.0, **limits if cuts else {})
        torch.testing.assert_close(found, want.entropy, atol=1e-6, rtol=0)
        assert (kept is not None) == cuts
        if kept is not None:
            assert kept.token_ids.equal(want.support.token_ids)
            assert kept.offsets.equal(want.support.offsets)


def test_rows_of_runner_v1_are_followed_as_they_are_replaced_and_moved():
    processor = EntropyProcessor(CONFIG, CPU, False)
    outputs = {number: [] for number in range(6)}

    def added(row, number):
        params = SamplingParams(temperature=0.5)
        params = entropies.recorded(params, number) if number != 1 else params
        return row, params, [1, 2], outputs[number]

    def step(*numbers):
        logits = torch.stack([logits_of(n, len(outputs[n])) for n in numbers])
        processor.apply(logits)
        for n in numbers:
            outputs[n].append(-1)

    one_way, swap = MoveDirectionality.UNIDIRECTIONAL, MoveDirectionality.SWAP
    processor.update_state(BatchUpdate(4, [], [added(n, n) for n in range(4)], []))
    step(0, 1, 2, 3)
    processor.update_state(BatchUpdate(4, [], [added(0, 4)], [(1, 3, swap)]))
    step(4, 3, 2, 1)
    processor.update_state(BatchUpdate(3, [], [], [(2, 0, one_way)]))  # 4 ended, 3 did not move
    step(2, 3)
    outputs[0] = list(outputs[0])  # 0 goes on, from a new list
    processor.update_state(BatchUpdate(4, [3], [added(2, 0), added(3, 5)], []))
    step(2, 3, 0, 5)
    processor.update_state(None)
    step(2, 3, 0, 5)
    keys = [0, 2, 3, 4, 5]
    lengths = [len(outputs[n]) for n in keys]
    found = decode([processor.records.read(keys, lengths)], keys, lengths)
    assert lengths == [3, 5, 5, 1, 2]
    for number, length, (entropy, _) in zip(keys, lengths, found, strict=True):
        logits = torch.stack([logits_of(number, i) for i in range(length)])
        torch.testing.assert_close(entropy, entropy_from_logits(logits, 0.5), atol=1e-6, rtol=0)


def test_both_runners_refuse_bad_requests_where_they_are_admitted():
    validators = [
        lambda params: validate_logits_processors_parameters([entropies.PROCESSOR], params),
        build_custom_logits_processors_params_validator([entropies.PROCESSOR]),
    ]
    for validate in validators:
        validate(SamplingParams(n=2, presence_penalty=1.0))
        params = entropies.recorded(SamplingParams(top_k=5), 1, sets=True)
        validate(params)
        for name, value in {"n": 2, "repetition_penalty": 1.5, "top_p": 0.5}.items():
            bad = params.clone()
            setattr(bad, name, value)
            with pytest.raises(VLLMValidationError, match=f"{name}.*; got"):
                validate(bad)


def test_sampling_that_is_spread_over_ranks_is_refused():
    sharded = SimpleNamespace(enable_batch_sharded_sampling=True)
    config = SimpleNamespace(**vars(CONFIG) | {"parallel_config": sharded})
    with pytest.raises(ValueError, match="enable_batch_sharded_sampling must be off; got True"):
        EntropyProcessor(config, CPU, False)


def test_supports_are_made_of_the_masks_that_vllm_returns():
    """vLLM's own recording of sets: slices of a batch, joined over the steps of a request."""
    flat = np.array([4, 7, 1, 2, 3, 9], dtype=np.int32)
    steps = SamplingMaskLists(flat, np.array([0, 2, 5, 6]))
    nested = [steps.slice_request(1, 1), steps.slice_request(2, 1)]
    mask = SamplingMask([ids for part in nested for ids in part.to_nested_list()])
    support = entropies.Support.of(mask.token_ids)
    assert support.token_ids.tolist() == [1, 2, 3, 9]
    assert support.offsets.tolist() == [0, 3, 4]
