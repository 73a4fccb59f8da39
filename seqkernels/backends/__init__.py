"""The implementations of the operator pair, one module each; ``seqkernels.ops`` registers them."""
