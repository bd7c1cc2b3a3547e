"""A job to plan: a run on so many GPUs, its assumed lengths, and how it is divided."""

import math
from dataclasses import dataclass, field
from functools import cached_property

from trainer.config import Config, sources
from trainer.launch.limits import check_model, check_ranks
from trainer.plan.architectures import Architecture
from trainer.plan.devices import Device
from trainer.plan.lengths import Lengths

BYTES = {"float32": 4, "bfloat16": 2}
CPU_PANEL = 64
"""Rows that the head stores together on a CPU."""


@dataclass(frozen=True)
class Assumptions:
    """Assumptions of a plan, none of them measured. Each is printed with the plan."""

    response_share: float = 0.37
    """Mean response, as a share of the limit: 7,628 of 20,480 tokens in the paper's 14B run
    (Table 2). Where the mean in tokens is given or read from a run, that is taken."""
    prompt: int = 150
    """Tokens of a prompt."""
    useful: float = 0.5
    """Share of the groups with right and wrong responses; the rounds of sampling follow from it."""
    mfu: float = 0.4
    """Share of the peak flops reached by matrix products, in every phase."""
    decode_efficiency: float = 0.6
    """Share of the memory's bandwidth reached while decoding."""
    network_efficiency: float = 0.7
    """Share of the links' bandwidth reached by collectives; they overlap with computation."""
    reserved: float = 4e9
    """Bytes of a GPU for CUDA's context, NCCL's buffers and CUDA graphs."""
    margin: float = 0.1
    """Share of a GPU that is left free where a run is said to fit: for fragmentation, and for what
    the plan counts too low."""

    def __post_init__(self) -> None:
        shares = ("response_share", "useful", "mfu", "decode_efficiency", "network_efficiency")
        for name in shares:
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in (0, 1]; got {getattr(self, name)}")
        if not 0 <= self.margin < 1:
            raise ValueError(f"margin must lie in [0, 1); got {self.margin}")
        if self.prompt < 1 or self.reserved < 0:
            raise ValueError(
                f"prompt must be at least 1 and reserved at least 0; got {self.prompt} and "
                f"{self.reserved}"
            )


@dataclass(frozen=True)
class Job:
    """A run of `config` on `gpus` GPUs; sequences are spread evenly over them. Each has an engine:
    on itself, or on GPUs apart where `config.engine.devices` names some.

    Raises:
        ValueError: numbers that cannot be meant, or what `train` refuses (launch/limits.py).
    """

    config: Config
    architecture: Architecture
    device: Device
    gpus: int = 1
    """GPUs that train: torchrun's ranks."""
    gpus_per_node: int = 8
    """GPUs of a machine that train: torchrun's --nproc-per-node."""
    machine_gpus: int = 8
    """All GPUs of a machine, with those of engines."""
    given_lengths: Lengths | None = None
    """Lengths of responses; None: those that `assumptions` give."""
    assumptions: Assumptions = field(default_factory=Assumptions)

    def __post_init__(self) -> None:
        for name in ("gpus", "gpus_per_node", "machine_gpus"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise ValueError(
                f"gpus must be a multiple of gpus_per_node, {self.gpus_per_node}, where there is "
                f"more than one node; got {self.gpus}"
            )
        ranks = min(self.gpus, self.gpus_per_node)
        if self.device.is_gpu and ranks > self.machine_gpus:
            raise ValueError(
                f"machine_gpus must be at least gpus_per_node, {ranks}; got {self.machine_gpus}"
            )
        of_device = ("triton", "cuda") if self.device.is_gpu else ("cpu",)
        impls = ("auto", *of_device, "torch")
        if self.config.model.impl not in impls:
            raise ValueError(
                f"model.impl must be one of {', '.join(impls)} in a plan for this device; "
                f"got {self.config.model.impl!r}"
            )
        check_ranks(self.config, ranks, self.machine_gpus if self.device.is_gpu else 0)
        model = self.architecture
        check_model(self.config, model.heads, model.kv_heads, model.positions)

    @property
    def nodes(self) -> int:
        return math.ceil(self.gpus / self.gpus_per_node)

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 shards weights, gradients and moments, over one GPU or more; layers and
        head then compute on copies, gathered and in the compute type."""
        return self.gpus > 1 or self.config.model.compute_dtype is not None

    @property
    def master_bytes(self) -> int:
        return BYTES[self.config.model.dtype]

    @property
    def compute_bytes(self) -> int:
        return BYTES[self.config.model.compute_dtype or self.config.model.dtype]

    @property
    def engine_bytes(self) -> int:
        """Bytes of a weight of the engine, and of a value in its cache."""
        dtype = self.config.engine.dtype
        return BYTES[dtype] if self.vllm and dtype != "auto" else self.compute_bytes

    @property
    def vllm(self) -> bool:
        return self.config.engine.kind == "vllm"

    @property
    def tensor_parallel(self) -> int:
        """GPUs that share one engine's weights."""
        return self.config.engine.tensor_parallel

    @property
    def apart(self) -> bool:
        """Whether engines have GPUs of their own."""
        return self.vllm and bool(self.config.engine.devices)

    @property
    def all_gpus(self) -> int:
        """GPUs that train and GPUs that sample."""
        return self.gpus * (1 + (self.tensor_parallel if self.apart else 0))

    @property
    def sequences_per_engine(self) -> int:
        """Sequences of one engine in a round of sampling."""
        return math.ceil(self.sequences / self.gpus)

    @cached_property
    def lengths(self) -> Lengths:
        """Lengths of responses."""
        limit = self.config.rollout.max_new_tokens
        return self.given_lengths or Lengths(self.assumptions.response_share * limit, limit)

    @property
    def response(self) -> float:
        """Mean tokens of a response."""
        return self.lengths.mean

    @property
    def squared_length(self) -> float:
        """Mean square of the tokens of a sequence, its prompt included."""
        prompt = self.assumptions.prompt
        return prompt * prompt + 2 * prompt * self.response + self.lengths.second_moment

    @property
    def longest(self) -> int:
        """Tokens of a sequence that reaches the limit."""
        return self.assumptions.prompt + self.config.rollout.max_new_tokens

    @property
    def rounds(self) -> int:
        """Rounds of sampling per step."""
        return min(math.ceil(1 / self.assumptions.useful), self.config.algorithm.max_rounds)

    @property
    def sequences(self) -> int:
        """Sequences that a step trains on; a round of sampling has as many."""
        return self.config.rollout.prompts * self.config.rollout.group_size

    @property
    def sequences_per_update(self) -> int:
        return self.sequences // self.config.optimizer.mini_batches

    @property
    def micro_batch(self) -> int:
        """Tokens of the largest micro-batch: the budget, or a sequence that exceeds it; but no
        more than an update can have on a GPU."""
        budget = max(self.config.optimizer.tokens_per_micro_batch, self.longest)
        return min(budget, math.ceil(self.sequences_per_update / self.gpus) * self.longest)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of an update on one GPU."""
        tokens = self.sequences_per_update / self.gpus * (self.assumptions.prompt + self.response)
        return math.ceil(tokens / self.config.optimizer.tokens_per_micro_batch)

    @property
    def selected_rows(self) -> int:
        """Rows of the largest micro-batch that are trained on; those of prompts are not."""
        responses = self.response / (self.assumptions.prompt + self.response)
        return math.ceil(self.trained * self.micro_batch * responses)

    @property
    def trained(self) -> float:
        """The share of the response tokens whose rows of the head get a gradient."""
        algorithm = self.config.algorithm
        return 1.0 if algorithm.bonus_on_all else algorithm.share

    @property
    def mask_known(self) -> bool:
        """Whether the tokens are known before the forward of the update."""
        algorithm = self.config.algorithm
        return algorithm.mask_known and not algorithm.bonus_on_all

    @property
    def comparisons(self) -> float:
        """Comparisons of sampler and policy in a step, which need a scoring pass over all."""
        every = self.config.algorithm.compare_every
        return 1 / every if every else 0.0

    @property
    def scoring_passes(self) -> float:
        """Scoring passes in a step: one, or those of comparisons alone."""
        return 1.0 if sources(self.config).score else self.comparisons

    @property
    def stored_logits(self) -> int:
        """Bytes of the fp32 logits that the head stores from forward to backward.

        They are those of all selected rows, if the rows are known and fit into the head's room. See
        docs/method.md. On a CPU they come in panels of rows.
        """
        on_gpu = self.device.is_gpu
        room = 1 << 30 if on_gpu else 1 << 28
        panel = 1 if on_gpu else CPU_PANEL
        rows = math.ceil(self.selected_rows / panel) * panel
        needed = 4 * rows * self.architecture.vocabulary
        pays = on_gpu or self.architecture.hidden >= (512 if self.compute_bytes == 4 else 1024)
        return needed if self.mask_known and pays and needed <= room else 0
