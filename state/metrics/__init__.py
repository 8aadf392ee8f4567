"""Metrics of predicted perturbations, under cell-eval's names and by its definitions.

``tables`` checks and groups cells, ``differential`` tests every perturbation against the control,
``pseudobulk`` averages; ``overlap`` (DES), ``agreement``, ``discrimination`` (PDS), ``error`` (MAE)
and ``energy`` compare a prediction with the truth. ``profiles`` says which of them are computed,
``aggregate`` sums up perturbations, and ``overall`` scales DES, PDS and MAE against a baseline.
"""
