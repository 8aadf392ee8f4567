"""Energy-distance MMD between two cell sets: the definition, fast versions, and the choice.

``reference.py`` is the definition, ``blocked.py`` a matrix-multiplication version with a
hand-derived gradient, ``dispatch.py`` the entry point. Imports nothing of ours.
"""
