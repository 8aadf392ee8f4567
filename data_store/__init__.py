"""From raw counts in an h5ad to a sharded store, and from the store to batches of cell sets.

Knows nothing of models, Ray or DeepSpeed. The way of the data:
``ingest -> normalize -> moments, genes -> shards, manifest -> store``, then
``store -> splits -> cell_sets -> sampler -> loader -> CellBatch``.
"""
