"""Fine-tune StyleGAN2-ADA networks with the logistic loss or the Rooted Logistic Objective."""

__version__ = "0.1.0"
