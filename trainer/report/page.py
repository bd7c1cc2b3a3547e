"""A run's folder as one page: report.html, which opens offline and asks nothing of the network."""

import time
import warnings
from pathlib import Path

import jinja2

from trainer.log import other_version, read_rows, read_run, replace_text
from trainer.report.curves import columns_of, sections
from trainer.report.facts import facts, notices, table, tiles
from trainer.report.samples import ends, samples
from trainer.report.skips import Skips
from trainer.report.standing import standing

NAME = "report.html"
SHARE = 0.05
"""The largest share of a run's time that its page may take."""


class LiveReport:
    """The page of a run under way. An error is told and stops nothing.

    Only the `first` of several ranks writes.
    """

    def __init__(self, folder: Path, first: bool = True):
        self.path = folder / NAME
        self._first = first
        self._due = 0.0  # by time.monotonic

    def refresh(self, running: bool = True) -> Path:
        """Write it anew, unless that would take over SHARE of the time; in the end always."""
        began = time.monotonic()
        if not self._first or (running and began < self._due):
            return self.path
        try:
            write_report(self.path.parent, running)
        # Any exception: a picture must not end a run of days.
        except Exception as error:
            warnings.warn(f"{self.path} was not written: {error!r}", RuntimeWarning, stacklevel=2)
        ended = time.monotonic()
        self._due = ended + (ended - began) / SHARE
        return self.path


def write_report(run_folder: Path, running: bool | None = None) -> Path:
    """Write `run_folder`/report.html from run.json, metrics.jsonl and samples.jsonl; its path.

    Works while the run goes on, which `running` tells; None: as far as the folder does. Raises
    ValueError where run.json is missing, metrics.jsonl is missing or empty, or what they hold is
    not what this version writes.
    """
    run_folder = Path(run_folder)
    run, metrics_path = read_run(run_folder), run_folder / "metrics.jsonl"
    if not metrics_path.exists():
        raise ValueError(f"{metrics_path} is missing: the run has not finished a step yet")
    rows = read_rows(metrics_path)
    if not rows:
        raise ValueError(f"{metrics_path} is empty: the run has not finished a step yet")
    skips = Skips()
    for row in rows:
        skips.add(row)
    columns = columns_of(rows)
    try:
        config = run["config"]
        page = template(Path(__file__).with_name("page.html.jinja")).render(
            name=config["name"],
            state=standing(run_folder, rows, config["steps"], running).sentence(),
            notices=notices(rows, skips),
            never=skips.never,
            facts=facts(run, rows, skips),
            tiles=tiles(rows, columns),
            sections=sections(rows, columns),
            metrics=table(columns),
            **samples(
                ends(run_folder / "samples.jsonl"), config.get("reward", {}).get("right", 1.0)
            ),
        )
    except KeyError as error:
        raise other_version(run_folder, error) from error
    path = run_folder / NAME
    # "replace": a byte-level tokenizer can leave halves of a character behind.
    replace_text(path, page.encode("utf-8", "replace").decode())
    return path


def template(path: Path) -> jinja2.Template:
    """The template at `path`, which escapes what it is given."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(path.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(path.name)
