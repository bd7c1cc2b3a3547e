"""Records of entropies by request, and what requests may ask, without vLLM."""

import asyncio
import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from entropy_kernels.integrations import _vllm_records, vllm, vllm_worker
from entropy_kernels.integrations._vllm_records import Records, decode
from entropy_kernels.integrations._vllm_request import NAME, check_params

CPU = torch.device("cpu")


def write(records, *rows):
    """`rows` are (slot, position, entropy)."""
    for slot, position, _ in rows:
        records.reached(slot, position + 1)
    slots, positions, entropies = zip(*rows, strict=True)
    records.write(torch.tensor(entropies), torch.tensor(slots), torch.tensor(positions))


def taken(records, keys, lengths):
    return [x.tolist() for x, _ in decode([records.read(keys, lengths)], keys, lengths)]


@pytest.fixture
def records():
    return Records(CPU, 2)


def test_a_slot_that_another_request_gets_keeps_its_values_by_key(records):
    records.begin(0, "a", 0)
    records.begin(1, "b", 0)
    write(records, (0, 0, 1.0), (1, 0, 2.0))
    write(records, (0, 1, 3.0), (1, 1, 4.0), (records.nobody, -7, 9.0))
    records.begin(0, "c", 0)
    write(records, (0, 0, 5.0), (1, 2, 6.0))
    assert taken(records, ["a", "b", "c"], [2, 3, 1]) == [[1, 3], [2, 4, 6], [5]]
    records.end(1)
    assert taken(records, ["c", "b"], [1, 2]) == [[5], [2, 4]]


@pytest.mark.parametrize("told", [True, False], ids=["V1 tells", "V2 does not"])
def test_a_preempted_request_goes_on_where_it_stopped(records, told):
    records.begin(0, 7, 0)
    for position in range(4):
        write(records, (0, position, float(position)))
    if told:
        records.end(0)
    records.begin(1, 7, 3)  # vLLM took the last token back
    records.begin(0, 8, 0)
    write(records, (1, 3, 30.0), (0, 0, 0.5))
    write(records, (1, 4, 40.0))
    assert taken(records, [7, 8], [5, 1]) == [[0, 1, 2, 30, 40], [0.5]]
    records.end(1)
    assert taken(records, [7], [5]) == [[0, 1, 2, 30, 40]]


def test_the_table_grows_with_the_longest_response(records):
    records.begin(0, 1, 0)
    records.begin(1, 2, 0)
    write(records, (0, 0, 1.0), (1, 0, 2.0))
    for position in range(1, 3 * _vllm_records.WIDTH):
        write(records, (1, position, float(position)))
    (one,), two = taken(records, [1, 2], [1, 3 * _vllm_records.WIDTH])
    assert one == 1
    assert two == [2.0, *range(1, 3 * _vllm_records.WIDTH)]


def test_sets_are_those_of_each_position_s_last_step(records):
    records.begin(0, 1, 0)
    for position, ids in [(0, [9, 9, 9]), (0, [3, 1]), (1, [4]), (2, [8, 7, 6])]:
        write(records, (0, position, 0.5))
        records.write_set(0, position, np.array(ids, dtype=np.int32))
    records.begin(1, 2, 0)
    write(records, (1, 0, 1.5))
    (_, kept), (_, none) = decode([records.read([1, 2], [2, 1])], [1, 2], [2, 1])
    assert kept.token_ids.tolist() == [3, 1, 4]
    assert kept.offsets.tolist() == [0, 2, 3]
    assert none is None


def test_what_is_not_known_is_refused_and_nothing_is_lost(records):
    records.begin(0, 1, 0)
    write(records, (0, 0, 1.0))
    with pytest.raises(ValueError, match="1 entropies and 0 sets are known of the 2 tokens of key"):
        taken(records, [1], [2])
    with pytest.raises(ValueError, match="0 entropies and 0 sets are known of the 1 tokens of key"):
        taken(records, [1, "never"], [1, 1])
    with pytest.raises(ValueError, match="no processor of ours"):
        decode([b"", b""], [1], [1])
    assert decode([b"", records.read([1], [1])], [1], [1])[0][0].tolist() == [1]
    assert taken(records, [1, "never"], [1, 0]) == [[1], []]


@pytest.mark.parametrize("case", ["both at once", "both at once, V2", "one after the other"])
def test_two_requests_with_one_key_are_refused(records, case):
    records.begin(0, 1, 0)
    for position in range(4):
        write(records, (0, position, 1.0))
    if case == "one after the other":
        records.end(0)
    records.begin(1, 1, 0 if case != "both at once, V2" else 4)
    write(records, (1, 0, 2.0))
    if case != "one after the other":
        records.reached(0, 5)  # the first one is sampled on
    with pytest.raises(ValueError, match="two requests had the key 1"):
        taken(records, [1], [1])
    records.forget([1])
    records.begin(0, 1, 0)
    write(records, (0, 0, 3.0))
    assert taken(records, [1], [1]) == [[3]]


def test_forgotten_requests_record_no_more(records):
    records.begin(0, 1, 0)
    records.begin(1, 2, 0)
    write(records, (0, 0, 1.0), (1, 0, 2.0))
    records.end(1)
    records.forget([1, 2, "unknown"])
    write(records, (0, 1, 1.0))
    assert not records._by_key
    assert records._idle_bytes == 0
    records.begin(0, 3, 0)
    records.forget(None)
    assert not records._by_key


def test_memory_of_requests_that_nobody_takes_is_bounded(records, monkeypatch):
    monkeypatch.setattr(_vllm_records, "LIMIT_BYTES", 100)
    for key in range(20):
        records.begin(0, key, 0)
        for position in range(4):
            write(records, (0, position, float(key)))
    records.end(0)
    assert records._idle_bytes == 4 * 4 * len(records._by_key) <= 100
    assert taken(records, [14, 19], [4, 4]) == [[14] * 4, [19] * 4]
    with pytest.raises(ValueError, match="of key 13"):
        taken(records, [13], [4])


class Params(SimpleNamespace):
    """The fields of vLLM's SamplingParams that are looked at."""

    def __init__(self, **changes):
        fields = {"n": 1, "temperature": 0.7, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        fields |= {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}
        super().__init__(**fields | {"extra_args": None, "thinking_token_budget": None} | changes)

    def clone(self):
        return copy.deepcopy(self)


def test_recorded_params_ask_for_their_key_and_cut_by_our_processor():
    params = Params(top_k=5, top_p=0.9, min_p=0.1, extra_args={"mine": 1})
    plain = vllm.recorded(params, "a")
    assert plain.extra_args == {
        "mine": 1,
        NAME: {"key": "a", "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    }
    assert (plain.top_k, plain.top_p, plain.min_p) == (5, 0.9, 0.1)
    sets = vllm.recorded(params, 3, sets=True)
    assert sets.extra_args[NAME] == {"key": 3, "top_k": 5, "top_p": 0.9, "min_p": 0.1}
    assert (sets.top_k, sets.top_p, sets.min_p) == (0, 1.0, 0.0)
    assert vllm.recorded(Params(top_k=-1), 3, sets=True).extra_args[NAME]["top_k"] == 0
    assert params == Params(top_k=5, top_p=0.9, min_p=0.1, extra_args={"mine": 1})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (Params(n=2), "must have n=1 and a key each; got n=2"),
        (Params(presence_penalty=0.5), "presence_penalty must be 0 .* are recorded; got 0.5"),
        (Params(frequency_penalty=0.5), "frequency_penalty must be 0"),
        (Params(repetition_penalty=1.1), "repetition_penalty must be 1 .*; got 1.1"),
        (Params(thinking_token_budget=5), "thinking_token_budget must be None"),
        (Params(extra_args={NAME: {"key": 1}}), "recorded already, under the key 1"),
    ],
)
def test_params_that_cannot_be_recorded_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        vllm.recorded(params, 2)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"key": 1.5}, "key must be int or str; got 1.5"),
        ({"key": True}, "key must be int or str; got True"),
        ({}, "must have a key, and may have key, top_k, top_p, min_p; got {}"),
        ([1], r"must have a key.*got \[1\]"),
        ({"key": 1, "top_k": -1}, "top_k must be at least 0; got -1"),
        ({"key": 1, "top_p": 0.0}, r"top_p must lie in \(0, 1\]; got 0.0"),
        ({"key": 1, "top_k": 1.5}, "top_k must be int; got 1.5"),
        ({"key": 1, "min_p": "a"}, "min_p must be int or float; got 'a'"),
        ({"key": 1, "min_p": 2}, r"min_p must lie in \[0, 1\]; got 2"),
    ],
)
def test_entries_that_are_none_of_ours_are_refused(entry, message):
    with pytest.raises(ValueError, match=message):
        check_params(Params(extra_args={NAME: entry}))


def test_vllm_must_not_cut_what_our_processor_cuts():
    check_params(Params())
    check_params(Params(top_p=0.9, extra_args={NAME: {"key": 1}}))
    for name, value in {"top_k": 5, "top_p": 0.9, "min_p": 0.1}.items():
        with pytest.raises(ValueError, match=f"{name} must be .* and sets are recorded; got"):
            check_params(Params(extra_args={NAME: {"key": 1, "top_k": 3}}, **{name: value}))


class Extension(vllm_worker.WorkerExtension):
    """Another trainer's."""


def test_options_keep_what_a_trainer_has():
    assert vllm.options() == {
        "logits_processors": [vllm.PROCESSOR],
        "worker_extension_cls": vllm.EXTENSION,
    }
    own = f"{__name__}.Extension"
    got = vllm.options(seed=1, logits_processors=("a:B",), worker_extension_cls=own)
    assert got == {
        "seed": 1,
        "logits_processors": ["a:B", vllm.PROCESSOR],
        "worker_extension_cls": own,
    }
    with pytest.raises(ValueError, match=r"must be a subclass of entropy_kernels\.integrations"):
        vllm.options(worker_extension_cls=f"{__name__}.Params")


class Worker(vllm_worker.WorkerExtension):
    def __init__(self, **runner):
        self.model_runner = SimpleNamespace(**runner)


class Engine:
    """vLLM's LLM, or what is awaited of its AsyncLLM: workers of one engine."""

    def __init__(self, *workers):
        self.workers = workers

    def collective_rpc(self, method, args=()):
        return [getattr(worker, method)(*args) for worker in self.workers]


class AsyncEngine(Engine):
    async def collective_rpc(self, method, args=()):
        return super().collective_rpc(method, args)


def engine_of(records, kind=Engine):
    """A rank without logits, one of a runner V1, and one of a runner V2 without a sampler."""
    found = SimpleNamespace(records=records)
    empty = SimpleNamespace(records=Records(CPU, 2))
    v1 = [SimpleNamespace(logitsprocs=SimpleNamespace(all=iter([x]))) for x in (empty, found)]
    return kind(Worker(sampler=None), *(Worker(input_batch=x) for x in v1))


def test_the_rank_that_has_all_answers(records):
    records.begin(0, 1, 0)
    write(records, (0, 0, 2.0))
    (got,) = vllm.take(engine_of(records), [1], [1])
    assert (got.entropies.tolist(), got.kept) == ([2.0], None)
    assert got.entropies.dtype == torch.float32
    v2 = Worker(sampler=SimpleNamespace(logits_processors=[1, SimpleNamespace(records=records)]))
    assert v2._entropy_kernels_records() is records


def test_taken_requests_are_forgotten_and_refused_ones_are_not(records):
    sampler = SimpleNamespace(logits_processors=[SimpleNamespace(records=records)])
    for kind in (Engine, AsyncEngine):
        engine = kind(Worker(sampler=sampler))
        for key in (1, 2, 3):
            records.begin(0, key, 0)
            write(records, (0, 0, float(key)))

        def take(*args, engine=engine, kind=kind):
            if kind is Engine:
                return vllm.take(engine, *args)
            return asyncio.run(vllm.take_async(engine, *args))

        with pytest.raises(ValueError, match="known of the 5 tokens of key 2"):
            take([1, 2], [1, 5])
        with pytest.raises(ValueError, match=r"keys must differ; got \['2'\] twice"):
            take([2, 2], [1, 1])
        with pytest.raises(ValueError, match="each key needs a length; got 1 keys, 2 lengths"):
            take([1], [1, 1])
        assert [x.entropies.tolist() for x in take(iter([2, 1]), iter([1, 1]))] == [[2], [1]]
        with pytest.raises(ValueError, match="known of the 1 tokens of key 2"):
            take([2], [1])
        assert list(records._by_key) == [3]
        vllm.forget(Engine(*engine.workers), [3])
    vllm.forget(Engine(Worker(sampler=sampler)))
    assert not records._by_key
