"""Small helpers that need nothing but the standard library; the names that network pickles refer to live here."""

from dnnlib import util
from dnnlib.util import EasyDict, make_cache_dir_path

__all__ = ["EasyDict", "make_cache_dir_path", "util"]
