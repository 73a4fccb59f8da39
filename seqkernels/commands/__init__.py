"""`python -m seqkernels` doctor and bench. Nothing of the library imports them."""
