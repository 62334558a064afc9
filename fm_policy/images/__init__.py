"""Unconditional flows on images: Table 1 of arXiv 2510.02081.

An image is a chunk, `(B, pixels, channels)`: a pixel for a time step and its channels for the numbers of an action. So
path, couplings, solvers, losses and the head of `fm_policy.flow` and `fm_policy.residual` apply as they are.
"""
