"""Which implementation of the operators runs. The one switch is the environment variable STYLEGAN_ROOTED_OPS.

`ref` forces the plain definitions of every operator; `auto` (the default) lets each operator take an equal but faster
path made of the same torch calls; `native` asks for compiled operators, of which there are none yet.
"""

import os

VARIABLE = "STYLEGAN_ROOTED_OPS"
CHOICES = ("auto", "native", "ref")

verbosity = "brief"


def requested() -> str:
    """What the environment asks for: `auto`, `native` or `ref`.

    Raises:
        ValueError: The variable holds anything else.
    """
    value = os.environ.get(VARIABLE, "auto").strip().lower() or "auto"
    if value not in CHOICES:
        raise ValueError(f"{VARIABLE} is {value!r}, wanted one of {', '.join(CHOICES)}")
    return value


def selected() -> str:
    """The family of implementations in use; `ref` (pure PyTorch) is the only one there is.

    Raises:
        ValueError: `native` is asked for, or the variable is not understood.
    """
    if requested() == "native":
        raise ValueError(f"{VARIABLE} is 'native', but there are no native operators yet; use 'auto' or 'ref'")
    return "ref"


def fast_paths(impl: str = "cuda") -> bool:
    """Whether an operator called with `impl` may take its faster path instead of its plain definition.

    Args:
        impl: The operator's argument: `cuda` (the default: whatever is fastest) or `ref` (the plain definition).

    Raises:
        ValueError: `impl` or the environment variable is not understood.
    """
    if impl not in ("cuda", "ref"):
        raise ValueError(f"impl is {impl!r}, wanted 'cuda' or 'ref'")
    selected()
    return impl != "ref" and requested() != "ref"
