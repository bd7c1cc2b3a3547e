"""One of the ranks that torchrun starts: an engine of its own, whose weights change once."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.trainer.small import Even, settings
from trainer.config import Engine, Model
from trainer.engines import make_engine
from trainer.engines.transformers import TransformersEngine
from trainer.policy import load_policy
from trainer.ranks import join
from trainer.rollout import sample


def main(placement: str, folder: str) -> None:
    """Write the responses that all ranks together got to 0.pt or 1.pt, if they are right."""
    config = settings(Path(folder), engine=Engine("vllm", placement, kv_cache_bytes=2**26))
    problems = [Even().problem("train", index) for index in range(3)]
    options = {"group_size": 2, "max_new_tokens": 6, "temperature": 0, "seed": 0}
    with join("cpu") as ranks:
        policy = load_policy(Model(), 0, ranks.device)
        engine = make_engine(config, policy)
        with torch.no_grad():
            for weight in policy.model.parameters():
                weight *= 2
        engine.sleep()
        engine.update_weights(policy.weights())
        got = sample(engine, policy, Even(), problems, ranks=ranks, **options)
        want = sample(TransformersEngine(policy, 64), policy, Even(), problems, **options)
        assert got.response_BL.equal(want.response_BL)
        assert got.responses == want.responses
        dist.barrier()
        torch.save(got.response_BL.tolist(), Path(folder) / f"{ranks.rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
