"""The steps that the benchmarks time, of peers and trainers, and the numbers of their tables."""

import pytest
import torch

from benchmarks import (
    bench_train_step,
    chunked_head,
    cost_tables,
    head_tables,
    peers,
    runner,
    step_tables,
    tables,
    train_step,
)
from benchmarks import bench_trl_step as trl_step
from benchmarks import linear_logprob_entropy as op
from entropy_kernels._bench.contestant import (
    EVERYTHING,
    NO_ENTROPIES,
    TOLD,
    WrongResultError,
)
from tests import onednn


def test_peers_that_are_installed_compute_the_step(monkeypatch):
    monkeypatch.setattr(chunked_head, "TOKENS", 16)
    monkeypatch.setattr(chunked_head, "VOCABULARY", 40)
    problem = op.make_problem(40, 16, 96, torch.float32)
    truth = op.truth(problem, op.FRACTION)
    checked = []
    for contestant in op.contestants(impls=()):
        if all(runner.find_spec(name) for name in contestant.needs):
            # A compiler takes longer than all the rest.
            results = (contestant.uncompiled or contestant.run)(problem)
            if contestant.name == "eager-onednn" and onednn.rounds_fp32():
                with pytest.raises(WrongResultError, match=r"is off by .* is allowed"):
                    runner.check(results, truth, torch.float32, exact=contestant.exact)
                continue
            errors = runner.check(results, truth, torch.float32, exact=contestant.exact)
            assert max(errors.values(), default=0.0) < 1e-5
            checked.append(contestant.name)
    assert {"eager", "chunked", "checkpoint", "lce", "lce-chunked", "floor"} <= set(checked)


@pytest.mark.filterwarnings("ignore")
def test_both_heads_compute_the_step_of_trls_trainer():
    """TRL's head multiplies prompts and all of backward; its trainer's warnings are its own."""
    pytest.importorskip("trl", reason="the step is that of TRL's trainer")
    shape, rounds = trl_step.QUICK
    contestants, problem = trl_step.contestants(), trl_step.make_problem(*shape)
    entries = runner.run_suite(
        contestants,
        problem,
        trl_step.truth,
        rounds=rounds,
        dtype=torch.float32,
    )
    assert all(entry["error"] < 1e-4 for entry in entries), entries
    flops = {entry["name"]: entry["flops"] for entry in entries}
    assert flops["ours"] < flops["trl-labels"] < flops["trl"]
    assert flops["ours-all"] == flops["trl-labels"]
    # All logits are kept, and the prompts are not scored.
    assert flops["lce-all"] < flops["trl-labels"]


def test_every_step_of_the_trainer_finds_the_same_loss_and_gradient():
    shape, _ = bench_train_step.QUICK
    found = {
        name: train_step.Step(shape, name, changes).run()
        for name, (_, changes) in bench_train_step.CONTESTANTS.items()
        if not peers.why_not(name)
    }
    eager = found["eager"]["sums"]
    same = [name for name in found if name != "ours-all"]
    assert {"lce", "ours", "ours-known"} <= set(same)
    for name in same:
        assert found[name]["sums"] == pytest.approx(eager, rel=1e-5), name
    assert found["ours-all"]["sums"] != pytest.approx(eager, rel=1e-2)
    assert all(run["head_s"] > 0 for run in found.values())


def test_a_wrong_step_of_the_trainer_is_refused():
    run = {"wall_s": 2.0, "cpu_s": 2.0, "head_s": 0.5, "peak_bytes": 9}
    run |= {"weights_bytes": 2, "gradients_bytes": 2, "moments_bytes": 4}

    def entry(name, loss):
        return {"name": name, "label": name, "runs": [run | {"sums": {"loss": loss}}]}

    eager, ours = entry("eager", 1.0), entry("ours", 1.00001)
    bench_train_step.join(eager, {"loss": 1.0})
    bench_train_step.join(ours, {"loss": 1.0})
    shape = bench_train_step.QUICK[0]._asdict()
    versions = {"torch": "2"}
    about = {"shape": shape, "dtype": "float32", "machine": "m", "threads": 1, "rounds": 2}
    about |= {"versions": versions, "commit": "c", "date": "d", "contestants": [eager, ours]}
    table = step_tables.train_step_tables([about])
    assert "| ours | 16.0 | 1.00 | 25.0% | 0 | 0 | 0 | 0 |" in table
    assert "| ours | 0 | 0 | 0 | 0 |" in step_tables.train_step_tables([about | {"rounds": 1}])
    with pytest.raises(runner.WrongResultError, match=r"wrong: .*1\.01"):
        bench_train_step.join(entry("wrong", 1.01), {"loss": 1.0})


def test_the_ratio_of_the_tables_is_to_the_faster_library():
    def entry(direction, name, threads, wall, cpu):
        samples = {"wall_s": [wall] * 3, "cpu_s": [cpu] * 3, "flops": 6e9}
        return {"name": f"{direction}-{name}-{threads}", "label": "", **samples}

    run = {
        "contestants": [
            entry("forward", "mm", 1, 9.0, 2.0),
            entry("forward", "mm-onednn", 1, 9.0, 1.0),
            entry("forward", "cpu", 1, 1.0, 1.5),
            entry("forward", "mm", 2, 0.5, 9.0),
            entry("forward", "cpu", 2, 0.6, 1.0),
        ]
    }
    assert head_tables.over_the_best(run, "forward", 1) == 1.5
    assert head_tables.over_the_best(run, "forward", 2) == pytest.approx(1.2)
    assert head_tables.over_the_best(run, "backward", 1) is None


def test_the_fastest_others_are_those_that_compute_as_much_and_those_that_do_less():
    def entry(name, wall, computes=None, label=""):
        more = {} if computes is None else {"computes": computes}
        return {"name": name, "label": label or name, "wall_s": [wall] * 3, **more}

    everyone = [
        entry("eager", 4.0, TOLD),
        entry("trl", 3.0, TOLD),
        entry("lce", 2.0, NO_ENTROPIES),
        entry("cce", 2.5, label="cce, no entropies"),
        entry("floor", 0.1),
        entry("cpu-0.2", 1.0, EVERYTHING, "ours"),
    ]
    with_entropies, without = head_tables.fastest_others({"contestants": everyone})
    assert (with_entropies["name"], without["name"]) == ("trl", "lce")
    assert head_tables.fastest_others({"contestants": everyone[3:]}) == ({}, everyone[3])
    table = head_tables.computes_table([{"contestants": everyone}])
    assert table.endswith(
        "| eager, trl | yes | yes |  | yes | yes |\n| lce | yes |  |  | yes | yes |"
    )
    assert head_tables.computes_table([{"contestants": everyone[3:5]}]) == ""


def test_fits_find_exponents_and_straight_lines():
    power = [(x, 0.0, 3 * x**1.5, 0.0) for x in (1.0, 2.0, 8.0, 64.0)]
    assert cost_tables.exponent(power) == pytest.approx(1.5)
    straight = [(x, 0.0, 1 + 3 * x, 0.0) for x in (0.1, 0.5, 1.0)]
    assert cost_tables.deviation(straight) == pytest.approx(0.0, abs=1e-12)
    assert cost_tables.deviation([*straight, (2.0, 0.0, 14.0, 0.0)]) > 0.1


def test_quantiles_and_ratios_are_taken_within_rounds():
    assert tables.quantile([4.0, 1.0, 2.0, 3.0, 5.0], 0.2) == pytest.approx(1.8)
    assert tables.ratios({"wall_s": [2.0, 20.0]}, {"wall_s": [1.0, 10.0]}) == [2.0, 2.0]
