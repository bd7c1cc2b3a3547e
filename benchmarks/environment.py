"""Settings that torch's OpenMP reads as it loads.

Threads sleep between parallel regions, so that CPU time counts work and not waiting; and each keeps
to its core, because a scheduler that wakes both on one core halves the speed of short regions.
After torch they would come too late: a second OpenMP, loaded later, would take all threads to the
first core.
"""

import os
import sys

CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OMP_PROC_BIND", "true")
