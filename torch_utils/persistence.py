"""Persistent classes: objects whose pickle carries the source text of the module that defines them.

Owns the decorator, the pickled form (spec: networks-and-pickles.md 3.1) and re-creation. Re-creation is closed: source
text that this process imported itself maps to the class it already has, so `copy.deepcopy` works; any other text is
refused unless the caller opened `trust_source()`. Reading a file without executing it is `torch_utils.pickle_reader`.
"""

import contextlib
import contextvars
import copy
import functools
import hashlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from dnnlib.util import EasyDict

FORMAT_VERSION = 6

_source_of_module: dict[str, str] = {}  # module name -> its full text
_class_of_source: dict[tuple[str, str], type] = {}  # (SHA-256 of text, class name) -> class
_module_of_source: dict[str, types.ModuleType] = {}  # SHA-256 of text -> module made by `trust_source`
_import_hooks: list[Callable[[EasyDict], EasyDict]] = []
_trusted: contextvars.ContextVar = contextvars.ContextVar("trusted", default=False)


def persistent_class(orig_class: type) -> type:
    """Make instances of a class remember their constructor call and pickle together with their module's source.

    Args:
        orig_class: the class to extend; changed in place and returned, so `super()` and `isinstance` keep working.

    Returns:
        The same class, with the properties `init_args` and `init_kwargs` (copies of the constructor's arguments).
    """
    if not isinstance(orig_class, type):
        raise ValueError(f"persistent_class got {orig_class!r}, wanted a class; decorate the class itself")
    if "_is_persistent_class" in vars(orig_class):
        return orig_class
    constructor = orig_class.__init__  # type: ignore[misc]
    inherited_reduce_ex: Callable[..., Any] = orig_class.__reduce_ex__

    @functools.wraps(constructor)
    def recording_constructor(self: Any, *args: Any, **kwargs: Any) -> None:
        if type(self) is orig_class:  # a persistent subclass has recorded its own arguments already
            self.__dict__["_init_args"] = copy.deepcopy(args)
            self.__dict__["_init_kwargs"] = copy.deepcopy(kwargs)
        constructor(self, *args, **kwargs)

    def reduce_ex(self: Any, protocol: Any) -> tuple:
        if "_is_persistent_class" not in vars(type(self)):  # a plain subclass pickles the plain way
            return inherited_reduce_ex(self, protocol)
        return (_reconstruct_persistent_obj, (describe(self, dict(self.__dict__)),), None)

    orig_class.__init__ = recording_constructor  # type: ignore[misc]
    orig_class.__reduce_ex__ = reduce_ex  # type: ignore[method-assign,assignment]
    orig_class.init_args = property(_init_args)  # type: ignore[attr-defined]
    orig_class.init_kwargs = property(_init_kwargs)  # type: ignore[attr-defined]
    orig_class._is_persistent_class = True  # type: ignore[attr-defined]

    source = _module_source(orig_class.__module__)
    if source is not None:
        _class_of_source.setdefault((_digest(source), orig_class.__name__), orig_class)
    return orig_class


def is_persistent(obj: Any) -> bool:
    """Tell whether a class, or the class of an object, is persistent."""
    cls = obj if isinstance(obj, type) else type(obj)
    return "_is_persistent_class" in vars(cls)


def import_hook(hook: Callable[[EasyDict], EasyDict]) -> Callable[[EasyDict], EasyDict]:
    """Register a function that sees, and may change, every record before its object is re-created.

    Args:
        hook: takes and returns the record (`type`, `version`, `module_src`, `class_name`, `state`); never returns None.

    Returns:
        The hook, so that this works as a decorator.
    """
    if not callable(hook):
        raise ValueError(f"import_hook got {hook!r}, wanted a function from record to record")
    _import_hooks.append(hook)
    return hook


def describe(obj: Any, state: dict) -> dict:
    """Return the record that stands for an object of a persistent class in a pickle.

    Args:
        obj: the object; its class says which source text and which name go in.
        state: what `__setstate__` is to receive.

    Raises:
        ValueError: the class is not persistent, or its module's source text is not known.
    """
    cls = type(obj)
    if not is_persistent(cls):
        raise ValueError(f"class {cls.__qualname__} is not persistent; decorate it with persistent_class")
    source = _module_source(cls.__module__)
    if source is None:
        raise ValueError(
            f"class {cls.__qualname__} of {cls.__module__} has no source text to save; define it in a module file"
        )
    return dict(type="class", version=FORMAT_VERSION, module_src=source, class_name=cls.__name__, state=state)


@contextlib.contextmanager
def trust_source() -> Iterator[None]:
    """Within this block, source text found in a pickle may be executed. DANGEROUS: that text can do anything.

    Only for files whose author you trust as you trust a program you run.
    """
    token = _trusted.set(True)
    try:
        yield
    finally:
        _trusted.reset(token)


def _reconstruct_persistent_obj(meta: dict) -> Any:
    """Re-create an object from its record; the one name that pickles of persistent objects refer to.

    Raises:
        ValueError: the record is of another version, or its source text is neither ours nor trusted.
    """
    record = EasyDict(meta)
    record.state = EasyDict(record.state)
    for hook in _import_hooks:
        record = hook(record)
        if record is None:
            raise ValueError(f"import hook {hook!r} returned None, wanted the record; return its argument")
    if record.get("type") != "class" or record.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"persistent object of type {record.get('type')!r}, version {record.get('version')!r}; "
            f"wanted type 'class', version {FORMAT_VERSION}; save the file again with a current version"
        )
    cls: Any = _find_class(record.module_src, record.class_name)
    obj = cls.__new__(cls)
    if hasattr(obj, "__setstate__"):
        obj.__setstate__(record.state)
    else:
        obj.__dict__.update(record.state)
    return obj


def _find_class(source: str, class_name: str) -> type:
    digest = _digest(source)
    cls = _class_of_source.get((digest, class_name))
    if cls is not None:
        return cls
    module = _module_of_source.get(digest)
    if module is None:
        if not _trusted.get():
            raise ValueError(
                f"class {class_name!r} comes with source text (SHA-256 {digest[:16]}) that this program has not "
                "imported; it is not executed; read the file with training.network_pickle.load, or trust its source"
            )
        module = _execute(source, digest)
    cls = vars(module).get(class_name)
    if not isinstance(cls, type):
        raise ValueError(f"the embedded source defines no class {class_name!r}; the file is damaged")
    return persistent_class(cls)


def _execute(source: str, digest: str) -> types.ModuleType:
    name = f"_imported_module_{digest[:32]}"
    module = types.ModuleType(name)
    sys.modules[name] = module
    _source_of_module[name] = source
    try:
        exec(compile(source, f"<{name}>", "exec"), module.__dict__)  # noqa: S102 - only under trust_source()
    except BaseException:
        del sys.modules[name], _source_of_module[name]
        raise
    _module_of_source[digest] = module
    return module


def _module_source(name: str) -> "str | None":
    """The text of an imported module, read once: when its first persistent class is made."""
    if name not in _source_of_module:
        loader: Any = getattr(sys.modules.get(name), "__loader__", None)
        try:
            source = loader.get_source(name) if hasattr(loader, "get_source") else None
        except (ImportError, OSError):
            source = None
        if source is None:
            return None
        _source_of_module[name] = source
    return _source_of_module[name]


def _digest(source: Any) -> str:
    if not isinstance(source, str):
        raise ValueError(f"module_src is of type {type(source).__name__}, wanted the source text; the file is damaged")
    return hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()


def _init_args(self: Any) -> tuple:
    """Positional arguments of the constructor call (a copy)."""
    return copy.deepcopy(tuple(self.__dict__["_init_args"]))


def _init_kwargs(self: Any) -> EasyDict:
    """Keyword arguments of the constructor call (a copy)."""
    return EasyDict(copy.deepcopy(self.__dict__["_init_kwargs"]))
