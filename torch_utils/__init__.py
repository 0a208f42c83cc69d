"""Tensor-level helpers: operators, persistence, images, seeds. Knows nothing of training or metrics."""
