"""python -m benchmarks.gpu [STAGE...] [--out FOLDER] [--seconds N] [--resume] [--quick]

One run measures a GPU within its seconds; without stages it takes all but `profile`. README.md says
what each costs. Without a GPU only --quick runs, on tiny shapes; --plan, --tables and --check need
none.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from benchmarks.gpu.conductor import HANG, Conductor, ask
from benchmarks.gpu.plan import ALONGSIDE, PROFILE, STAGES, Shard
from benchmarks.gpu.rows import Rows, read

SECONDS = 480
# What imports and a first look at the GPU may take.
DESCRIBING = 90.0
# What every worker imports before its job comes.
IMPORTS = ("benchmarks.gpu.steps", "benchmarks.gpu.sweep", "benchmarks.gpu.selection")


def main(arguments: list[str]) -> int:
    """The exit status: 1 where a shard had no time or has died, or a file is refused."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of the whole run")
    parser.add_argument("--resume", action="store_true", help="goes on with the run in --out")
    parser.add_argument("--commit", help="commit of the sources, where there is no .git")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--plan", action="store_true", help="prints the shards, measures nothing")
    parser.add_argument("--tables", type=Path, nargs="+", metavar="FILE", help="of measured rows")
    parser.add_argument(
        "--check", type=Path, nargs="+", metavar="FILE", help="whether rows are fit"
    )
    given = parser.parse_args(arguments)
    if not given.seconds > 0:
        parser.error(f"--seconds must be above 0; got {given.seconds:g}")
    for file in given.tables or ():
        if not read(file)[0]:
            parser.error(f"--tables must be files of measured rows; got {file}, which has none")
    unknown = set(given.stages) - set(STAGES)
    if unknown:
        parser.error(f"no stage {', '.join(sorted(unknown))}; stages are {', '.join(STAGES)}")
    if given.tables:
        return _tables(given.tables)
    if given.check:
        return _check(given.check)
    path = given.out / "rows.jsonl"
    if not given.plan and not given.resume and path.exists():
        parser.error(f"{path} has the rows of a run; --resume goes on, or give another --out")
    return _run(given, path, began + given.seconds)


def _run(given: argparse.Namespace, path: Path, end: float) -> int:
    if given.quick:
        # Read as the files of the kernels load. A GPU's own rows are never of the interpreter.
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    job = {
        "out": str(given.out.resolve()),
        "quick": given.quick,
        "plan": given.plan,
        "commit": given.commit,
        "about": {},
    }
    found = ask("benchmarks.gpu.plan:describe", job, min(DESCRIBING, given.seconds))
    wanted = given.stages or [stage for stage in STAGES if stage != PROFILE]
    shards = [Shard(**x) for x in found["shards"]]
    shards = [shard for shard in shards if shard.stage in wanted]
    if given.plan:
        _print_plan(shards, found["processes"])
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    rows = Rows(path, found["about"])
    left_out = Conductor(
        rows,
        shards,
        end,
        job | {"about": found["about"]},
        found["processes"],
        found["memory"],
        IMPORTS,
        # Who gives more time has a slower machine.
        hang=HANG * max(1.0, given.seconds / SECONDS),
    ).run()
    print(f"{given.seconds - (end - time.monotonic()):.0f} s; {path}")
    if left_out:
        print(f"no time for {', '.join(left_out)}; --resume goes on")
    died = [row["name"] for row in rows.of("run") if "error" in row]
    if died:
        print(f"died before their end: {', '.join(died)}; their rows of stage run say why")
    return int(bool(left_out or died))


def _print_plan(shards: list[Shard], processes: int) -> None:
    """Seconds are predictions."""
    whole = 0.0
    for shard in shards:
        share = shard.seconds / (processes if shard.stage in ALONGSIDE else 1)
        whole += share
        print(f"{shard.stage:12} {share:6.1f} s at {whole:5.0f} s  {shard.name}")
    print(f"predicted: {whole:.0f} s, with {processes} processes beside each other")


def _tables(paths: list[Path]) -> int:
    from benchmarks.gpu import table

    for path in paths:
        for rows in table.runs(path):
            print(f"{table.in_short(rows)}\n\n{table.whole(rows)}\n")
    return 0


def _check(paths: list[Path]) -> int:
    from benchmarks.gpu import schema

    wrong = [f"{path}: {complaint}" for path in paths for complaint in schema.complaints(path)]
    for path in paths:
        print(f"{path}: {len(read(path)[0])} rows")
    print("\n".join(wrong) or "fit for benchmarks/results/gpu/")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
