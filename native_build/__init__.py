"""How setup.py builds the compiled parts: the tools of this machine (`toolchain`), the translation units of the CUDA
kernels (`cuda`), which files become which library (`libraries`), and the build itself (`ninja`)."""

from pathlib import Path

ROOT = Path(__file__).parents[1].resolve()
