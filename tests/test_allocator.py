"""The allocator that keeps freed blocks: in a process of its own, as it stays for the rest of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from torch_utils import custom_ops
from torch_utils.ops import allocator

STRESS = """
import os, threading
import torch
from torch_utils.ops import allocator

before = [torch.arange(n, dtype=torch.float32) for n in (0, 3, 5000)]  # made by torch's own allocator
assert allocator.keep_blocks() and allocator.keep_blocks()

block = torch.empty(1000)
place = block.data_ptr()
del block
assert torch.empty(1010).data_ptr() == place, "the newest block of a size comes first"

errors, shared, lock = [], [], threading.Lock()

def work(seed):
    rng = torch.Generator().manual_seed(seed)
    mine = []
    for step in range(400):
        power = int(torch.randint(1, 25 if step % 50 == 0 else 18, [], generator=rng))
        n = int(torch.randint(0, 1 << power, [], generator=rng))
        t = torch.full([n], seed * 1000 + step, dtype=torch.int32)
        if t.data_ptr() % 64:
            errors.append(f"{n} elements at {t.data_ptr():x}")
        mine.append((t, seed * 1000 + step))
        if len(mine) > 20:  # some are freed here, some by whoever comes next
            tensor, value = mine.pop(step % 20)
            if not bool((tensor == value).all()):
                errors.append(f"{tensor.numel()} elements were written to by others")
            with lock:
                shared.append(tensor)
                if len(shared) > 10:
                    shared.pop(0)
    errors.extend("left" for tensor, value in mine if not bool((tensor == value).all()))

threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not errors, errors[:3]
shared.clear()
assert 0 < allocator.kept_bytes() <= 128 << 20

big = [torch.empty(3 << 20) for _ in range(30)]  # 360 MiB: more than may wait
del big
assert allocator.kept_bytes() <= 128 << 20
huge = torch.zeros(20 << 20)
kept = allocator.kept_bytes()
del huge
assert allocator.kept_bytes() == kept, "the largest do not wait"

child = os.fork()
if not child:
    ok = bool((torch.full([10000], 7.0) == 7).all())
    os._exit(0 if ok else 1)
assert os.waitpid(child, 0)[1] == 0

torch.manual_seed(0)
x = torch.randn(2, 32, 20, 20, requires_grad=True)
def result():
    y = torch.nn.functional.conv2d(x, torch.ones(32, 32, 3, 3)).relu().square().sum()
    return torch.autograd.grad(y, x)[0]
ours = result()
allocator.give_back()
assert allocator.kept_bytes() == 0
assert torch.equal(ours, result()) and allocator.kept_bytes() == 0
assert allocator.keep_blocks()
del before, ours
print("done")
"""


def run(script: str, **env: str) -> subprocess.CompletedProcess:
    root = str(Path(__file__).resolve().parent.parent)
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=root, timeout=120, env={**os.environ, **env}
    )


def test_blocks_are_kept_and_given_back_under_stress() -> None:
    if not custom_ops.available():
        pytest.skip("no compiled operators here")
    done = run(STRESS, STYLEGAN_ROOTED_OPS="native", STYLEGAN_ROOTED_ALLOCATOR="blocks")
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr[-2000:]


def test_the_switch(monkeypatch) -> None:
    for value in ("system", ""):
        monkeypatch.setenv(allocator.VARIABLE, value)
        assert not allocator.keep_blocks()
    monkeypatch.setenv(allocator.VARIABLE, "fast")
    with pytest.raises(ValueError, match="STYLEGAN_ROOTED_ALLOCATOR is 'fast', wanted one of system, blocks"):
        allocator.keep_blocks()
    monkeypatch.setenv(allocator.VARIABLE, "blocks")
    monkeypatch.setenv(custom_ops.VARIABLE, "torch")
    assert not allocator.keep_blocks() and allocator.kept_bytes() == 0
    allocator.give_back()  # nothing to do
