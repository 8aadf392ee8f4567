"""Simple models that every trained model has to beat, on the same cells and metrics.

``registry.build_baselines`` makes them from the config; ``base.Baseline`` is what they share.
"""
