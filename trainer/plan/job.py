"""What is planned: a run on so many GPUs, what it is assumed to sample, and how it is divided."""

import math
from dataclasses import dataclass, field

from trainer.config import Config
from trainer.plan.architectures import Architecture
from trainer.plan.devices import Device

BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Assumptions:
    """What a plan takes for granted; none of it is measured. Each is printed with the plan."""

    response_share: float = 0.37
    """Mean response, as a share of the limit: 7,628 of 20,480 tokens in the paper's 14B run
    (Table 2). All sequences are taken to be of that length."""
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
    """Bytes of a GPU for CUDA's context, NCCL, CUDA graphs and fragmentation."""

    def __post_init__(self) -> None:
        shares = ("response_share", "useful", "mfu", "decode_efficiency", "network_efficiency")
        for name in shares:
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in (0, 1]; got {getattr(self, name)}")
        if self.prompt < 1 or self.reserved < 0:
            raise ValueError(
                f"prompt must be at least 1 and reserved at least 0; got {self.prompt} and "
                f"{self.reserved}"
            )


@dataclass(frozen=True)
class Job:
    """A run of `config` on `gpus` GPUs; sequences are spread evenly over them. Each has an engine:
    on itself, or on GPUs apart where `config.engine.devices` names some."""

    config: Config
    architecture: Architecture
    device: Device
    gpus: int = 1
    gpus_per_node: int = 8
    assumptions: Assumptions = field(default_factory=Assumptions)

    def __post_init__(self) -> None:
        for name in ("gpus", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise ValueError(
                f"gpus must be a multiple of gpus_per_node, {self.gpus_per_node}, where there is "
                f"more than one node; got {self.gpus}"
            )
        if self.architecture.heads % self.tensor_parallel:
            raise ValueError(
                f"engine.tensor_parallel must divide the model's {self.architecture.heads} heads; "
                f"got {self.tensor_parallel}"
            )
        if self.sequences_per_update < self.gpus:
            raise ValueError(
                f"an update has {self.sequences_per_update} sequences, fewer than {self.gpus} "
                "GPUs: some would have nothing to do"
            )

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
        """Of a weight, and of a value in the cache, of the engine."""
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
    def sequences_per_engine(self) -> int:
        """In a round of sampling."""
        return math.ceil(self.sequences / self.gpus)

    @property
    def response(self) -> float:
        """Mean tokens of a response."""
        return self.assumptions.response_share * self.config.rollout.max_new_tokens

    @property
    def longest(self) -> int:
        """Tokens of a sequence that reaches the limit."""
        return self.assumptions.prompt + self.config.rollout.max_new_tokens

    @property
    def rounds(self) -> int:
        """Of sampling, in a step."""
        return min(math.ceil(1 / self.assumptions.useful), self.config.algorithm.max_rounds)

    @property
    def sequences(self) -> int:
        """That a step trains on. A round of sampling has as many."""
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
        """Of an update, on one GPU."""
        tokens = self.sequences_per_update / self.gpus * (self.assumptions.prompt + self.response)
        return math.ceil(tokens / self.config.optimizer.tokens_per_micro_batch)

    @property
    def kept_rows(self) -> int:
        """Rows of the largest micro-batch that are trained on."""
        return math.ceil(self.config.algorithm.fraction * self.micro_batch)

    @property
    def mask_known(self) -> bool:
        """Whether the tokens are known before the forward of the update."""
        algorithm = self.config.algorithm
        return algorithm.entropy_source == "old" or algorithm.fraction == 1

    @property
    def kept_logits(self) -> int:
        """Bytes of the fp32 logits that the head keeps from forward to backward (see
        docs/method.md): those of all kept rows where they are known and fit into its room."""
        on_gpu = self.device.is_gpu
        room = 1 << 30 if on_gpu else 1 << 28
        needed = 4 * self.kept_rows * self.architecture.vocabulary
        pays = on_gpu or self.architecture.hidden >= (512 if self.compute_bytes == 4 else 1024)
        return needed if self.mask_known and pays and needed <= room else 0
