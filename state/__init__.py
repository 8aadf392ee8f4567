"""The science: the STATE model, its loss, its training loop, baselines and metrics.

Imports no Ray. Batches and matrices arrive as the types of ``data_store.schema``.
"""
