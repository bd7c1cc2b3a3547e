"""The planner: the needs of a run, before it is started.

    python -m trainer plan qwen3-14b --gpus 128 --gpu h200

gives the memory of a GPU by part and phase, the flops of a step by part, the head's share of them,
the time of a step, and what the whole run comes to. Memory and flops follow from shapes; seconds
from the vendor's peaks and the assumptions that are printed beside them. It needs no GPU and no
network, and refuses what `train` refuses.
"""
