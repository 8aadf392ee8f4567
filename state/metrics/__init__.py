"""DES, PDS, MAE and Overall, under cell-eval's names and by its definitions.

``tables`` checks and groups cells, ``differential`` tests every perturbation against the control,
``pseudobulk`` averages; ``overlap`` (DES), ``discrimination`` (PDS), ``error`` (MAE) compare a
prediction with the truth, and ``overall`` scales the three against a baseline.
"""
