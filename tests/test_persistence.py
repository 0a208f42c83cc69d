"""Persistent classes: recorded constructor calls, deepcopy without executing, refusal of unknown source."""

import copy
import importlib
import pickle
import sys
from pathlib import Path

import pytest
import torch

from torch_utils import persistence

SOURCE = '''
import torch
from torch_utils import persistence

@persistence.persistent_class
class Base(torch.nn.Module):
    def __init__(self, width, *, options={}):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full([width], 2.0))
        options["seen"] = True

@persistence.persistent_class
class Child(Base):
    def __init__(self, width):
        super().__init__(width, options={})
        self.inner = Base(width + 1, options=dict(a=1))

class Undecorated(Child):
    pass

@persistence.persistent_class
class Plain:
    def __init__(self, x):
        self.x = x
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name = f"persistent_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(f"# {name}{SOURCE}")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module(name)
    sys.modules.pop(name, None)


def foreign_record(net: torch.nn.Module) -> dict:
    record = persistence.describe(net, dict(net.__dict__))
    record["module_src"] += "\nimport builtins; builtins.executed_text = True\n"
    return record


def test_constructor_call_is_recorded_as_copies(module) -> None:
    net = module.Child(3)
    assert net.init_args == (3,) and net.init_kwargs == {}
    assert net.inner.init_args == (4,) and net.inner.init_kwargs.options == {"a": 1}
    net.inner.init_kwargs.options["b"] = 2
    assert net.inner.init_kwargs == {"options": {"a": 1}}, "a caller changed the record"


def test_class_is_changed_in_place(module) -> None:
    assert type(module.Child(1)) is module.Child and isinstance(module.Child(1), module.Base)
    assert persistence.persistent_class(module.Base) is module.Base
    assert persistence.is_persistent(module.Child) and persistence.is_persistent(module.Child(1))
    assert not persistence.is_persistent(module.Undecorated(1)) and not persistence.is_persistent(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="wanted a class"):
        persistence.persistent_class(3)


def test_deepcopy_and_pickle_give_the_imported_class(module) -> None:
    net = module.Child(3)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert type(twin) is module.Child and type(twin.inner) is module.Base
        assert twin.init_args == (3,)
        assert torch.equal(twin.weight, net.weight) and twin.weight is not net.weight
    plain = copy.deepcopy(module.Plain([1, 2]))
    assert type(plain) is module.Plain and plain.x == [1, 2]


def test_shared_parameters_stay_shared(module) -> None:
    net = module.Child(3)
    net.inner.weight = net.weight
    twin = copy.deepcopy(net)
    assert twin.inner.weight is twin.weight


def test_record_has_the_familys_form(module) -> None:
    reconstruct, (record,), state = module.Child(2).__reduce_ex__(4)
    assert reconstruct is persistence._reconstruct_persistent_obj and state is None
    assert list(record) == ["type", "version", "module_src", "class_name", "state"]
    assert (record["type"], record["version"], record["class_name"]) == ("class", 6, "Child")
    assert record["module_src"] == Path(module.__file__).read_text()
    assert record["state"]["_init_args"] == (2,)


def test_unknown_source_is_refused_and_trust_ends_with_its_block(module) -> None:
    import builtins

    record = foreign_record(module.Child(2))
    with pytest.raises(ValueError, match="not executed") as refusal:
        persistence._reconstruct_persistent_obj(record)
    assert "\n" not in str(refusal.value) and not hasattr(builtins, "executed_text")
    try:
        with persistence.trust_source():
            net = persistence._reconstruct_persistent_obj(record)
        assert builtins.executed_text
    finally:
        del builtins.executed_text
    assert type(net).__module__.startswith("_imported_module_") and type(net) is not module.Child
    assert type(copy.deepcopy(net)) is type(net), "a copy needs no new trust"
    assert persistence.describe(net, {})["module_src"] == record["module_src"], "re-saving keeps the source"
    other = {**record, "module_src": record["module_src"] + "\n"}
    with pytest.raises(ValueError, match="not executed"):
        persistence._reconstruct_persistent_obj(other)


def test_failing_source_leaves_nothing_behind() -> None:
    record = dict(type="class", version=6, module_src="raise RuntimeError('no')", class_name="A", state={})
    before = set(sys.modules)
    with persistence.trust_source(), pytest.raises(RuntimeError, match="no"):
        persistence._reconstruct_persistent_obj(record)
    assert set(sys.modules) == before


@pytest.mark.parametrize("change", [{"version": 5}, {"type": "function"}, {"module_src": 7}, {"class_name": "torch"}])
def test_odd_records_are_refused(module, change: dict) -> None:
    record = {**persistence.describe(module.Child(2), {}), **change}
    with pytest.raises(ValueError) as refusal, persistence.trust_source():
        persistence._reconstruct_persistent_obj(record)
    assert "\n" not in str(refusal.value)


def test_import_hooks_see_every_record(module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(persistence, "_import_hooks", [])
    seen = []

    @persistence.import_hook
    def hook(record):
        seen.append(record.class_name)
        return record

    copy.deepcopy(module.Child(2))
    assert sorted(seen) == ["Base", "Child"]
    persistence.import_hook(lambda record: None)
    with pytest.raises(ValueError, match="returned None"):
        copy.deepcopy(module.Child(2))


def test_class_without_source_is_refused() -> None:
    namespace = {"__name__": "nowhere", "persistence": persistence}
    exec("@persistence.persistent_class\nclass A: pass", namespace)
    with pytest.raises(ValueError, match="no source text"):
        pickle.dumps(namespace["A"]())
