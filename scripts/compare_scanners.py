"""Compare what picklescan, fickling and this project say of the hostile corpus and of genuine network files.

Needs `pip install picklescan fickling`. Each file is judged in a process of its own with a time limit, since some are
built to exhaust their reader. A scanner has caught a file if it calls it anything but clean, or fails on it with an
error of its own; it has missed it if it calls it clean, hangs for 20 s or dies.

Usage: python scripts/compare_scanners.py [GENUINE_FILE ...]      (prints two tables in Markdown)
"""

import json
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import fuzz_pickles

from torch_utils import pickle_reader
from training import recognise

MAX_SEC = 20
SCANNERS = ("stylegan-rooted", "picklescan", "fickling")


def judge(scanner: str, path: str) -> str:
    """'clean', or 'caught' (by a verdict, or by refusing to read on)."""
    if scanner == "picklescan":
        from picklescan.scanner import scan_file_path

        result = scan_file_path(path)
        return "caught" if result.issues_count or result.infected_files or result.scan_err else "clean"
    import fickling

    try:
        return "clean" if fickling.is_likely_safe(path) else "caught"
    except Exception:  # whatever it fails with, nobody would go on to open the file
        return "caught"


def judge_apart(scanner: str, path: Path) -> str:
    """The same in a process of its own; of this project's reader, which has one for all files."""
    if scanner == SCANNERS[0]:
        verdict = reader(path.read_bytes())["verdict"]
        return {"loaded": "clean", "refused": "caught"}.get(verdict, verdict)
    command = [sys.executable, __file__, "--judge", scanner, str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=MAX_SEC)
    except subprocess.TimeoutExpired:
        return "hung"
    return done.stdout.strip() if done.returncode == 0 else "died"


def suffix(data: bytes) -> str:
    """The ending that such a file usually has: picklescan goes by it."""
    if recognise.is_safetensors(data):
        return ".safetensors"
    return ".pt" if data[:2] == b"PK" or pickle_reader.TORCH_MAGIC.to_bytes(10, "little") in data[:16] else ".pkl"


def main(extra: list[str]) -> None:
    """Print the tables."""
    index = json.loads((fuzz_pickles.HOSTILE / "index.json").read_text())
    kinds = ("code", "exhaust", "lie", "broken")
    caught: dict[str, dict[str, Counter]] = {kind: defaultdict(Counter) for kind in kinds}
    missed_code = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for name, data in fuzz_pickles.hostile().items():
            path = Path(folder) / f"{name}.pkl"
            path.write_bytes(data)
            for scanner in SCANNERS:
                verdict = judge_apart(scanner, path)
                if index[name].get("loads") and scanner == "stylegan-rooted" and verdict == "clean":
                    verdict = "inert"
                caught[index[name]["kind"]][scanner][verdict] += 1
                if index[name]["kind"] == "code" and verdict not in ("caught", "inert"):
                    missed_code[scanner].append(name)
        real = fuzz_pickles.genuine() | {Path(name).name: Path(name).read_bytes() for name in extra}
        print("| kind | files | " + " | ".join(SCANNERS) + " |\n|---|---|" + "---|" * len(SCANNERS))
        for kind, counts in caught.items():
            total = sum(counts[SCANNERS[0]].values())
            cells = (", ".join(f"{number} {what}" for what, number in counts[s].most_common()) for s in SCANNERS)
            print(f"| {kind} | {total} | " + " | ".join(cells) + " |")
        print("\n| genuine file | " + " | ".join(SCANNERS) + " |\n|---|" + "---|" * len(SCANNERS))
        for name, data in real.items():
            path = Path(folder) / f"{name}{suffix(data)}"
            path.write_bytes(data)
            print(f"| {name} | " + " | ".join(judge_apart(scanner, path) for scanner in SCANNERS) + " |")
    for scanner, names in missed_code.items():
        print(f"\nFiles that would run code, not caught by {scanner}: {', '.join(names)}")


if __name__ == "__main__":
    reader = fuzz_pickles.Reader()
    if sys.argv[1:2] == ["--judge"]:
        print(judge(*sys.argv[2:4]))
    else:
        main(sys.argv[1:])
