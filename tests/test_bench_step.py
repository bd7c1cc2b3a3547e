"""The step that `--bench` times: its truth, the heads of others, and its memory."""

from functools import partial

import pytest
import torch

from entropy_kernels._bench import command, contestant, measure, others, rounds, step

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_of_others_find_the_step(dtype):
    problem = step.make_problem(40, 16, 96, dtype, (0.2,))
    wanted = step.truth(problem, 0.2)
    names = set()
    for entrant in command.entrants("torch", CPU, dtype, 0.2):
        if entrant.name in ("lce", "lce-chunked", "trl"):
            if others.why_no_torch_head() or not all(map(measure.find_spec, entrant.needs)):
                continue
            found = entrant.run(problem)
            contestant.check(found, wanted, dtype, exact=False)
            assert ("entropy" in found) is ("entropies" in entrant.computes)
            names.add(entrant.name)
    assert names >= ({"lce", "lce-chunked"} if not others.why_no_torch_head() else set())


@pytest.mark.skipif(bool(others.why_no_torch_head()), reason=others.why_no_torch_head() or "-")
def test_torchs_head_in_chunks_has_a_product_more_than_with_all_logits():
    """Its custom operation hides them from our count; torch's profiler sees them."""
    T, D, V = 40, 16, 96
    problem = step.make_problem(T, D, V, torch.float32, (0.2,))
    for chunked, units in ((False, 3), (True, 4)):
        head = partial(others.torch_head, chunked=chunked)
        with torch.profiler.profile(with_flops=True) as profile:
            step.dense(head, problem, fraction=0.2)
        flops = {"aten::mm": 0, "aten::addmm": 0, "aten::addmm_": 0}
        for event in profile.key_averages():
            flops[event.key] = flops.get(event.key, 0) + event.flops
        counted = flops["aten::mm"] + flops["aten::addmm"] + flops["aten::addmm_"]
        assert counted / (2 * T * D * V) == units


def test_a_problem_drawn_on_its_device_has_the_same_truth():
    """What GPUs take: "cpu:0" is not "cpu", and stands for one."""
    problem = step.make_problem(40, 16, 300, torch.float32, (0.2,), torch.device("cpu:0"), 24)
    assert len({float(x) for x in problem.entropy}) == 40
    wanted = step.truth(problem, 0.2)
    eager = step.dense(step.plain_head, problem, fraction=0.2)
    found = eager, step.ours(problem, impl="torch", fraction=0.2)
    for results in found:
        errors = contestant.check(results, wanted, torch.float32, exact=True)
        assert 0 < max(errors.values()) < 1e-5


def test_products_by_onednn_end_with_their_block():
    before = torch.get_float32_matmul_precision()
    with step.products_by_onednn():
        assert torch.get_float32_matmul_precision() == "medium"
    with pytest.raises(ZeroDivisionError), step.products_by_onednn():
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == before
    half = step.make_problem(8, 4, 32, torch.bfloat16, (0.2,))
    with pytest.raises(contestant.RefusedError, match="for fp32 on a CPU alone"):
        step.dense_by_onednn(step.plain_head, half, fraction=0.2)


def test_peak_memory_sees_what_a_call_holds():
    why = rounds.why_no_peak(torch.device("cpu"))
    if why is not None:
        pytest.skip(why)
    size = 1 << 26
    held, peak = rounds.peak_of(lambda: torch.ones(2 * size // 4)[: size // 4].clone(), CPU)
    assert held.numel() == size // 4
    assert 2.9 * size < peak < 3.3 * size
