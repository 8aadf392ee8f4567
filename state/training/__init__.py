"""Data-parallel training: engine (DeepSpeed), loop, checkpoints, monitor, learning rate."""
