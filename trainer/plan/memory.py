"""Bytes that a GPU holds in each phase of a step, by part.

T tokens of the largest micro-batch, D hidden, I intermediate, V vocabulary. What is not listed
(masks, positions, statistics of a few floats per token) is left to `Assumptions.reserved`.
"""

from trainer.config import is_flash
from trainer.plan.job import Job

Memory = dict[str, dict[str, float]]
"""Phase -> part -> bytes."""

# What entropy_kernels allocates on a GPU: forward's workspace, and dz, whose columns are the most
# multiples of DZ_COLUMNS that fit its bytes, at least one.
FORWARD_WORKSPACE = 1 << 29
DZ_COLUMNS, DZ_BYTES = 1024, 1 << 28


def step_memory(job: Job) -> Memory:
    """Bytes of each part on one GPU, in every phase of a step.

    Backward goes from the head through the last layer to the first and ends at the embedding. On
    its way it frees activations and, in an update's first micro-batch, makes gradients.
    """
    model, master = job.architecture, job.master_bytes
    share = master * model.parameters / job.gpus
    always = {"weights": share, "AdamW's moments": 2 * share}
    if job.device.is_gpu:
        always["reserved"] = job.assumptions.reserved
    sampling = {"sample": always | ({} if job.apart else _engine(job))}
    if job.apart:
        sampling["engine"] = {"reserved": job.assumptions.reserved} | _engine(job)
    if job.sharded and not job.vllm:
        always["engine's weights"] = float(job.compute_bytes * model.parameters)  # its copy
    gradients = {"gradients": share}
    before = always | (gradients if job.micro_batches > 1 else _embedding_gradient(job))
    gathered = {}
    if job.sharded:
        gathered["embedding and head"] = float(job.compute_bytes * model.outside)
    tokens = float(job.micro_batch)
    kept = {"activations kept": tokens * model.layers * _kept_by_layer(job)}
    one = {"activations kept": tokens * _kept_by_layer(job)}
    layer = gathered | _one_layer(job)
    alone = {"gathered layers": layer["gathered layers"] / 2} if job.sharded else {}
    # It is added in place where there is a sum, the embedding's or one of earlier micro-batches,
    # except for sharded ones.
    first = job.micro_batches == 1 and not model.tied
    head = _head_gradient(job) if job.sharded or first else {}
    return sampling | {
        "head": before | gathered | kept | head | {"head's workspace": _head(job)},
        "last layer": before | layer | kept | head,
        "first layer": always
        | _almost_all(job, share)
        | layer
        | alone
        | one
        | (head if job.sharded else {}),
        "end": always | gradients | gathered | _embedding(job),
        "AdamW": always | gradients,  # fused: without temporaries
    }


def peak(memory: Memory) -> tuple[str, float]:
    """The phase with the most bytes, and how many."""
    phase = max(memory, key=lambda name: sum(memory[name].values()))
    return phase, sum(memory[phase].values())


def eager_logits(job: Job) -> float:
    """Bytes of [T, V] logits that a head without fusion holds at its peak, at the least: they,
    their log-softmax and their gradient, in fp32."""
    return 3.0 * 4 * job.micro_batch * job.architecture.vocabulary


def cache_bytes(job: Job) -> float:
    """Keys and values of one token on one GPU of an engine."""
    model = job.architecture
    heads = max(model.kv_heads / job.tensor_parallel, 1)
    return 2.0 * model.layers * heads * model.head_dim * job.engine_bytes


def engine_room(job: Job) -> float:
    """Bytes by which vLLM's share of a GPU exceeds its weights and one longest sequence: below 0
    it does not start."""
    share = job.config.engine.memory_utilization * job.device.memory
    longest = job.config.engine.max_model_len or job.longest
    return share - _engine_weights(job) - longest * cache_bytes(job)


def _almost_all(job: Job, share: float) -> dict[str, float]:
    """Gradients before those of the first layer and the embedding, in a first micro-batch."""
    model = job.architecture
    missing = model.layer if job.micro_batches == 1 else 0
    if job.sharded and job.micro_batches == 1 and not model.tied:
        missing += model.head
    return {"gradients": share - job.master_bytes * missing / job.gpus}


def _head_gradient(job: Job) -> dict[str, float]:
    """The head's gradient of one micro-batch, in the compute type."""
    return {"gradient of the head": float(job.compute_bytes * job.architecture.head)}


def _kept_by_layer(job: Job) -> float:
    """Bytes per token from forward to backward: a layer's input, or all that its backward needs."""
    own = 0.0 if job.config.model.gradient_checkpointing else _saved(job)
    return job.compute_bytes * job.architecture.hidden + own


def _saved(job: Job) -> float:
    """Bytes per token that transformers' layer keeps for its backward, its input left out."""
    model, E, attention = job.architecture, job.compute_bytes, job.config.model.attention
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    # RMSNorm works in fp32: its input's fp32 copy (in fp32 the input itself, which for the first
    # norm is the layer's), and what it is before and after the weight; q's and k's go on to RoPE.
    norms = 4 * model.hidden * (2 if E < 4 else 1) + 2 * 2 * E * model.hidden
    norms += (q + kv) * (4 + E) * model.qk_norm
    # q, k, v and the result; where there is a mask, as over packed sequences, k and v are repeated
    # for each head, except by flash attention.
    attended = E * (2 * q + 2 * kv if is_flash(attention) else 4 * q)
    if attention == "eager":
        attended += model.heads * job.longest * (4 if E == 4 else 4 + E)
    return norms + attended + 4 * E * model.intermediate


def _one_layer(job: Job) -> dict[str, float]:
    """Backward of one layer: its weights and the next one's, what is recomputed, gradients."""
    model, E, tokens = job.architecture, job.compute_bytes, job.micro_batch
    between = 2 * E * (model.intermediate + model.hidden)
    if job.config.model.attention == "eager":
        between += 2 * 4 * model.heads * job.longest
    parts = {"activation gradients": float(tokens * between)}
    if job.config.model.gradient_checkpointing:
        parts["activations recomputed"] = tokens * _saved(job)
    if job.sharded:
        parts["gathered layers"] = 2.0 * E * model.layer
        parts["gradient of a layer"] = (E + 4.0) * model.layer
    return parts


def _head(job: Job) -> float:
    """Hidden states, their gradient, and the more of forward's workspace and backward's."""
    model, E, rows = job.architecture, job.compute_bytes, job.selected_rows
    # And what the last norm keeps.
    hidden = (2.0 * E + 4 + E) * job.micro_batch * model.hidden
    if not job.device.is_gpu:
        return hidden + job.stored_logits + rows * model.hidden * (E + 4)
    columns = max(DZ_BYTES // (rows * E) // DZ_COLUMNS, 1) * DZ_COLUMNS
    columns = min(columns, model.vocabulary)
    backward = rows * (model.hidden * (E + 4 + 4) + columns * E) + job.stored_logits
    return hidden + max(FORWARD_WORKSPACE, backward)


def _embedding(job: Job) -> dict[str, float]:
    """The end of backward: the embedding's gradient, and its reduction with the head's in fp32.

    Where it is not sharded, its rows are added to a gradient that is there.
    """
    model, E = job.architecture, job.compute_bytes
    return {"embedding's gradient": (E + 4.0) * model.outside} if job.sharded else {}


def _embedding_gradient(job: Job) -> dict[str, float]:
    """The gradient that the first micro-batch finds, of zeros."""
    model = job.architecture
    return {} if job.sharded else {"gradients": float(job.master_bytes * model.head)}


def _engine(job: Job) -> dict[str, float]:
    """The engine's weights where it has its own, and its cache."""
    if not job.vllm:
        batch = min(job.config.rollout.batch_size, job.sequences_per_engine)
        logits = 2.0 * 4 * batch * job.architecture.vocabulary
        own = {"engine's weights": _engine_weights(job)} if job.sharded else {}
        return own | {"cache": batch * job.longest * cache_bytes(job), "logits": logits}
    weights = _engine_weights(job)
    share = job.config.engine.memory_utilization * job.device.memory
    cache = float(job.config.engine.kv_cache_bytes) or max(share - weights, 0.0)
    return {"engine's weights": weights, "cache": cache}


def _engine_weights(job: Job) -> float:
    return job.engine_bytes * job.architecture.parameters / job.tensor_parallel
