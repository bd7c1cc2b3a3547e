"""The figures of a run's report: which metrics, in which unit, and what to read from them."""

from dataclasses import dataclass

from trainer.report.skips import KINDS

COLORS = ("c1", "c2", "c3", "c4", "ink")


@dataclass(frozen=True)
class Curve:
    """A metric on a figure."""

    key: str
    label: str
    color: str
    markers: bool = False
    dashed: bool = False
    ends: tuple[str, str] = ("", "")
    """Metrics of the ends of its interval, drawn where they were logged."""


@dataclass(frozen=True)
class Figure:
    """A plot of the page: what it shows, in which unit, and what to read from it."""

    title: str
    note: str
    unit: str
    curves: tuple[Curve, ...]
    zero: bool = True
    smooth: bool = True
    events: bool = False
    """Whether it shows events that need not happen: curves that are 0 throughout are left out."""
    group: str = ""
    """A prefix of metrics, each of which is a curve, in the place of `curves`."""

    @property
    def scale(self) -> float:
        """What the metrics are multiplied by: shares are shown in percent."""
        return 100.0 if self.unit.startswith("%") else 1.0


REWARDS = (
    Figure(
        "Held-out accuracy",
        "Sampled responses, and greedy ones. Shaded: 95% interval of the mean over problems.",
        "% of problems",
        (
            Curve("eval/accuracy", "sampled", "c1", True, ends=("eval/low", "eval/high")),
            Curve(
                "eval/greedy", "greedy", "c2", True, ends=("eval/greedy_low", "eval/greedy_high")
            ),
        ),
    ),
    Figure(
        "Training reward",
        "Mean verdict on the step's responses.",
        "reward",
        (Curve("reward/mean", "mean", "c1"),),
    ),
)
RESPONSES = (
    Figure(
        "Kinds of responses",
        "By verdict; those not right by the reason: the length limit, no answer in the form that "
        "the verifier reads, or the verifier's own failure.",
        "% of responses",
        tuple(
            Curve(f"kind/{kind}", kind, color) for kind, color in zip(KINDS, COLORS, strict=True)
        ),
        events=True,
    ),
    Figure(
        "Response length",
        "End-of-sequence included.",
        "tokens",
        (Curve("response/length", "training", "c1"), Curve("eval/length", "held out", "c2", True)),
        zero=False,
    ),
    Figure(
        "Truncated responses",
        "Stopped by the length limit.",
        "% of responses",
        (Curve("response/truncated", "truncated", "c1"),),
    ),
    Figure(
        "Groups",
        "A group is useful if its verdicts differ; the others teach nothing.",
        "groups per step",
        (
            Curve("groups/useful", "useful", "c1"),
            Curve("groups/all_right", "all right", "c3"),
            Curve("groups/all_wrong", "all wrong", "c2"),
        ),
    ),
    Figure(
        "Skipped steps",
        "Steps so far that updated nothing, by reason.",
        "steps",
        (),
        events=True,
        group="skips/",
        smooth=False,
    ),
    Figure(
        "Verifier failures",
        "Responses so far that scored 0 because the verifier took too long or failed.",
        "responses",
        (
            Curve("failures/timeouts", "time-outs", "c1"),
            Curve("failures/crashes", "crashes", "c2"),
        ),
        events=True,
        smooth=False,
    ),
)
UPDATES = (
    Figure(
        "Loss",
        "The policy's loss before each update; it need not fall.",
        "loss",
        (Curve("loss", "loss", "c1"),),
        zero=False,
    ),
    Figure(
        "Gradient norm",
        "Before clipping.",
        "norm",
        (Curve("grad_norm", "norm", "c1"),),
    ),
    Figure(
        "Sampler and trainer: KL",
        "Estimate of KL(sampler || policy before updates) per token, of the tokens that the step "
        "measures; rounding alone keeps it small.",
        "nats",
        (Curve("mismatch/kl", "KL", "c1"),),
    ),
    Figure(
        "Sampler and trainer: largest ratio",
        "The largest ratio of one token's probabilities; 1 where both agree.",
        "ratio",
        (Curve("mismatch/max_ratio", "largest", "c1"),),
        zero=False,
    ),
    Figure(
        "Clipped tokens",
        "Share of the selected tokens whose ratio left the clip range.",
        "% of selected tokens",
        (Curve("clip/high", "high", "c1"), Curve("clip/low", "low", "c2")),
    ),
)
TOKENS = (
    Figure(
        "Token entropy",
        "Percentiles over the step's response tokens.",
        "nats",
        (
            Curve("entropy/p95", "p95", "s3"),
            Curve("entropy/p80", "p80", "s2"),
            Curve("entropy/p50", "p50", "s1"),
            Curve("entropy/mean", "mean", "ink", dashed=True),
        ),
        smooth=False,
    ),
    Figure(
        "Entropy threshold",
        "Where selected tokens part from the others, and the mean entropy of the selected.",
        "nats",
        (
            Curve("entropy/selected_mean", "mean of selected", "c2"),
            Curve("entropy/threshold", "threshold", "c1"),
        ),
        smooth=False,
    ),
    Figure(
        "Entropy bonus",
        "What the mean entropy is multiplied with in the loss; a target or a band moves it.",
        "coefficient",
        (Curve("entropy/coefficient", "coefficient", "c1"),),
        smooth=False,
    ),
    Figure(
        "Kept tokens",
        "Share of the response tokens that the loss is taken over.",
        "% of tokens",
        (Curve("entropy/selected_fraction", "selected", "c1"),),
        smooth=False,
    ),
    Figure(
        "Tokens of sampler and policy",
        "Tokens that the entropies of both select, on the steps that compare them.",
        "% of tokens",
        (
            Curve("mask/overlap", "of those of either", "c1", True),
            Curve("mask/shared", "of the sampler's", "c2", True),
        ),
        smooth=False,
    ),
)
COST = (
    Figure(
        "Rows of the head",
        "All rows given to the head, and those that carry gradient in backward.",
        "rows per step",
        (Curve("head/rows", "all", "c2"), Curve("head/active_rows", "in backward", "c1")),
        smooth=False,
    ),
    Figure(
        "Time of a step",
        "Its parts: sampling, a scoring pass of the policy where there is one, update. Evaluation "
        "is not in it.",
        "seconds",
        (
            Curve("time/sample", "sample", "c1"),
            Curve("time/update", "update", "c2"),
            Curve("time/score", "score", "ink"),
        ),
    ),
    Figure(
        "LM head in the step",
        "Time in the head over the time of the whole step.",
        "% of step time",
        (Curve("head/share", "head", "c1"),),
    ),
)

SECTIONS = {
    "Accuracy and reward": REWARDS,
    "Responses": RESPONSES,
    "Updates": UPDATES,
    "Tokens": TOKENS,
    "Cost": COST,
}
