"""Named random streams: a draw is keyed by what it is for and where training stands, never by what was drawn before.

A stream keyed by (seed, rank, images seen, purpose) is the same in a resumed run, and the same in two runs that differ
in something else, such as the loss. Knows nothing of training.
"""

import contextlib
import hashlib
from collections.abc import Iterator

import torch


def derive(seed: int, *keys: int | str) -> int:
    """Mix a seed with any number of keys into a 63-bit seed.

    Args:
        seed: The run's seed.
        keys: What the stream is for, e.g. `("latents", rank, cur_nimg)`. Order matters.

    Returns:
        An integer in [0, 2^63). Equal inputs give equal results on every machine and Python version.
    """
    text = "\x1f".join(f"{type(key).__name__}:{key}" for key in (seed, *keys))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *keys: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh torch generator on `device`, seeded by `derive(seed, *keys)`."""
    return torch.Generator(device=device).manual_seed(derive(seed, *keys))


@contextlib.contextmanager
def scoped(seed: int, *keys: int | str) -> Iterator[None]:
    """Seed torch's global generators (CPU and CUDA) inside the block; restore their state afterwards."""
    cpu_state = torch.get_rng_state()
    has_cuda = torch.cuda.is_available()
    cuda_states = torch.cuda.get_rng_state_all() if has_cuda and torch.cuda.is_initialized() else None
    value = derive(seed, *keys)
    try:
        # torch.manual_seed would also note down who asked, stack and all, for each kind of device that is not there.
        torch.default_generator.manual_seed(value)
        if has_cuda:
            torch.cuda.manual_seed_all(value)
        yield
    finally:
        torch.set_rng_state(cpu_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)
