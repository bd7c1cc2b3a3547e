"""The command line: `python -m trainer` and one of

    train [PRESET] [--options]      train, or go on from the last checkpoint of the run's folder;
                                    without a preset or file it runs the preset "tiny"
    evaluate --model M [--data D]   accuracy, pass@k and lengths of a model or a run
    analyze WHAT [--options]        entropy patterns, two temperatures, changes over training
    compare [PRESET] [--options]    the paper's ablation and baselines from one preset, by seeds
    plan [PRESET] --gpus N          memory, flops and time of a run, before it is started
    watch RUN                       follow a run from another terminal
    report RUN                      write the page of a run
    export RUN OUT [--options]      write its policy as a transformers folder

`--help` after a command lists its options. `torchrun --nproc-per-node N -m trainer train ...`
trains on N devices (docs/trainer.md), and `evaluate` spreads its problems over them.
"""

import argparse
import contextlib
import difflib
import io
import os
import select
import shlex
import signal
import sys
from collections.abc import Callable

# Before torch: threads that spin while they wait take the cores from those that work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from pathlib import Path

from trainer.errors import line, told_elsewhere
from trainer.launch.stop import STATUS, Stopped, overtaken, signals_stop

USAGE = __doc__
_GO_ON = ("train", "evaluate", "compare")
_BROKEN_PIPE = 141  # A shell's status of a command that SIGPIPE has ended.


def main(arguments: list[str]) -> int:
    """Run one command; returns the exit status."""
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    commands = {
        "train": _train,
        "evaluate": _evaluate,
        "analyze": _analyze,
        "compare": _compare,
        "plan": _plan,
        "watch": _watch,
        "report": _report,
        "export": _export,
    }
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # Its encoding may lack a character.
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            if command not in commands:
                return _usage(command, list(commands))
            with signals_stop():
                return _guarded(lambda: _run(commands[command], rest), arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _unread():
            raise
        # What is left in the buffer would fail again at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if command in _GO_ON:
            print("error: nobody reads the output any more", file=sys.stderr)
        return _BROKEN_PIPE


def _run(command: Callable[[list[str]], int], rest: list[str]) -> int:
    from trainer.launch.needs import check_base

    check_base()
    return command(rest)


def _usage(command: str, commands: list[str]) -> int:
    """Print the commands, and the one that may be meant."""
    wanted = command in ("-h", "--help", "help")
    if command and not wanted:
        close = difflib.get_close_matches(command, commands, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        print(f"error: no command {command!r}{hint}", file=sys.stderr)
    print(USAGE.strip() if USAGE else "")
    return 0 if wanted else 2


def _guarded(work: Callable[[], int], arguments: list[str]) -> int:
    """The status of `work`. An error caused by the user or the machine is told in one line."""
    try:
        return work()
    except KeyboardInterrupt as error:
        if fault := overtaken(error):
            return _told(fault)
        stopped = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
        if _first():
            print(f"\n{_farewell(stopped, arguments)}", file=sys.stderr)
        return STATUS[stopped.signal]
    except BrokenPipeError:
        raise
    except Exception as error:
        return _told(error)


def _told(error: Exception) -> int:
    """Print the error's line and return the status; an error without a line is raised."""
    if (text := line(error)) is None:
        raise error
    rank = int(os.environ.get("RANK", "0"))
    if not told_elsewhere(error, rank):
        print(f"rank {rank}: " * (rank > 0) + f"error: {text}", file=sys.stderr)
    return 1


def _unread() -> bool:
    """Whether stdout is a pipe that nobody reads."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLERR)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _farewell(stopped: Stopped, arguments: list[str]) -> str:
    """The line on what a signal has ended, and how to go on."""
    by = "Ctrl-C" if stopped.signal.name == "SIGINT" else stopped.signal.name
    parts = [" ".join(filter(None, [f"stopped by {by}", stopped.where]))]
    if arguments[0] in _GO_ON:
        alone = "RANK" not in os.environ
        command = f"python -m trainer {shlex.join(arguments)}" if alone else "the same command"
        parts.append(f"to go on: {command}")
    return "\n".join(parts)


def _train(arguments: list[str]) -> int:
    from trainer.config.files import as_yaml
    from trainer.launch.command_line import parse_train

    asked = parse_train(arguments)
    if asked.print_config:
        print(as_yaml(asked.config), end="")
        return 0

    import transformers

    from trainer.train import train

    transformers.utils.logging.disable_progress_bar()
    report = train(asked.config, allow_changes=asked.allow_changes, branch=asked.branch)
    if _first():
        print(f"report: {report}")
    return 0


def _first() -> bool:
    """Whether this is the first of the processes that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def _evaluate(arguments: list[str]) -> int:
    import transformers
    import tyro

    from trainer.evaluation.command import Evaluation, evaluate_model

    settings = tyro.cli(Evaluation, args=arguments, prog="python -m trainer evaluate")
    transformers.utils.logging.disable_progress_bar()
    evaluate_model(settings)
    return 0


def _analyze(arguments: list[str]) -> int:
    from trainer.studies.analyze import main as analyze

    return analyze(arguments)


def _compare(arguments: list[str]) -> int:
    from trainer.studies.compare import main as compare

    return compare(arguments)


def _watch(arguments: list[str]) -> int:
    from trainer.report.watch import watch

    run = _folder("watch", "Follow a run from another terminal.", arguments)
    with contextlib.suppress(KeyboardInterrupt):
        watch(run)
    return 0


def _folder(command: str, does: str, arguments: list[str]) -> Path:
    """The one argument of `command`, a run's folder."""
    parser = argparse.ArgumentParser(f"python -m trainer {command}", description=does)
    parser.add_argument("run", nargs="*", metavar="RUN", help="its folder, such as runs/tiny")
    found = parser.parse_args(arguments).run
    if len(found) != 1:
        raise ValueError(f"{command} takes one run's folder; got {len(found)} arguments")
    return Path(found[0])


def _plan(arguments: list[str]) -> int:
    from trainer.plan.command import main as plan

    return plan(arguments)


def _report(arguments: list[str]) -> int:
    from trainer.report.page import write_report

    run = _folder("report", "Write the page of a run.", arguments)
    print(f"report: {write_report(run)}")
    return 0


def _export(arguments: list[str]) -> int:
    import transformers
    import tyro

    from trainer.checkpoint.export import export

    transformers.utils.logging.disable_progress_bar()
    out = tyro.cli(export, args=arguments, prog="python -m trainer export")
    print(f"model: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
