"""Runs nvcc, and fails where its code would be slow: where it spills registers, and where products
of wgmma wait for each other (C7510 and its kin). To ptxas these are no errors.

    python nvcc_launcher.py NVCC ARGUMENT...

ptxas tells of spills if it is given --warn-on-spills.
"""

import re
import subprocess
import sys

SLOW = re.compile(r"spilled to local memory|instructions are serialized")


def main(command: list[str]) -> int:
    """nvcc's exit status, or 1."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, end="")
    if SLOW.search(done.stdout):
        print("Refused: ptxas says above that this code spills registers, or serializes wgmma.")
        return done.returncode or 1
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
