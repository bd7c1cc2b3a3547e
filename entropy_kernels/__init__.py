"""A gradient-sparse LM head for RLVR on high-entropy tokens.

Per-token log-probability and vocabulary-wide entropy from hidden states, without [T, V] logits; an
exact entropy threshold; the clipped policy loss on the tokens above it; and a backward that pays
only for the rows that carry gradient. Method: arXiv 2506.01939.
"""

import warnings

with warnings.catch_warnings():
    # torch tells of a missing numpy, which nothing here needs.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    import torch as _torch  # noqa: F401

from . import losses, token_rules
from .entropy_control import EntropyController
from .entropy_threshold import entropy_threshold
from .head import Head
from .high_entropy_policy_loss import high_entropy_policy_loss
from .linear_logprob_entropy import LogprobEntropy, linear_logprob_entropy
from .nn import HighEntropyPolicyLoss
from .options import KL, Aggregation, Backend, Correction, EntropyBonus, Parallel, Selection
from .ratio_loss import ratio_loss
from .sampling import Truncated, entropy_from_logits, truncate
from .streaming_threshold import StreamingThreshold
from .support import Support
from .top_entropy_mask import top_entropy_mask

__version__ = "0.1.0"

__all__ = [
    "KL",
    "Aggregation",
    "Backend",
    "Correction",
    "EntropyBonus",
    "EntropyController",
    "Head",
    "HighEntropyPolicyLoss",
    "LogprobEntropy",
    "Parallel",
    "Selection",
    "StreamingThreshold",
    "Support",
    "Truncated",
    "entropy_from_logits",
    "entropy_threshold",
    "high_entropy_policy_loss",
    "linear_logprob_entropy",
    "losses",
    "ratio_loss",
    "token_rules",
    "top_entropy_mask",
    "truncate",
]
