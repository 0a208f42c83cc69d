"""The operators of StyleGAN2: filters, biased activations, resampling convolutions, grid sampling."""
