"""The loss between cell sets: MMD^2 under several kernels, and the Sinkhorn divergence.

``reference.py`` is the definition, ``blocked.py`` a matrix-multiplication version with a
hand-derived gradient, ``fused_triton.py`` the same for GPUs, ``dispatch.py`` the entry point.
``docs/kernels.md`` derives the formulas. Imports nothing of ours.
"""
