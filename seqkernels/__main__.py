"""`python -m seqkernels`: what this install has, what is missing, and how to get it."""

import seqkernels
from seqkernels import hardware

if __name__ == "__main__":
    rows = [("seqkernels", seqkernels.__version__), *hardware.describe()]
    width = max(len(what) for what, _ in rows)
    for what, finding in rows:
        print(f"{what:<{width}}  {finding}")
