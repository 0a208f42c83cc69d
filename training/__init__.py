"""Training of StyleGAN2-ADA networks: networks, augmentation, data, loss, loop. Knows nothing of metrics."""
