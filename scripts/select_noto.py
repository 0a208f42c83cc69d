"""Copy the faces and people of the Noto emoji (npm package emoji-datasource-google) into one folder per subcategory.

Usage: python scripts/select_noto.py PACKAGE_FOLDER DEST_FOLDER [--all]
"""

import argparse
import json
import shutil
from collections import Counter
from pathlib import Path

SUBCATEGORIES = {
    "face-smiling",
    "face-affection",
    "face-tongue",
    "face-hand",
    "face-neutral-skeptical",
    "face-sleepy",
    "face-unwell",
    "face-hat",
    "face-glasses",
    "face-concerned",
    "face-negative",
    "face-costume",
    "cat-face",
    "monkey-face",
    "heart",
    "person",
}


def emoji_images(package: Path) -> list[tuple[str, Path]]:
    """(subcategory, PNG) of every image in the package, skin tones included."""
    rows = []
    for entry in json.loads((package / "emoji.json").read_text(encoding="utf-8")):
        for item in [entry, *entry.get("skin_variations", {}).values()]:
            path = package / "img" / "google" / "64" / item["image"]
            if path.is_file():
                rows.append((entry["subcategory"], path))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", type=Path)
    parser.add_argument("dest", type=Path)
    parser.add_argument("--all", action="store_true", help="take every image, not only faces and people")
    args = parser.parse_args()
    counts: Counter[str] = Counter()
    for subcategory, path in emoji_images(args.package):
        if args.all or subcategory in SUBCATEGORIES:
            folder = args.dest / subcategory
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / path.name)
            counts[subcategory] += 1
    for subcategory, count in sorted(counts.items()):
        print(f"{count:5d} {subcategory}")
    print(f"{counts.total():5d} images in {args.dest}")


if __name__ == "__main__":
    main()
