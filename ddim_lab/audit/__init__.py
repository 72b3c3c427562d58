"""`python -m ddim_lab.audit`: a Fréchet distance again with one convention changed at a time, and what it explains."""
