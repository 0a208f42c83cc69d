"""The data set's record that travels in network files. Knows which settings it has; opens no data set.

Loaders of the family take `class_name` for the name of something to call with the other entries. So what a stranger's
file says there is never passed on: known settings with plain values stay, and the class is always the family's.
Source: networks-and-pickles.md section 3.2.
"""

from collections.abc import Mapping
from typing import Any

from torch_utils.pickle_reader import printable

CLASS_NAME = "training.dataset.ImageFolderDataset"
KINDS: dict[str, tuple[type, ...]] = {
    "class_name": (str,),
    "path": (str,),
    "use_labels": (bool, int),
    "max_size": (int, type(None)),
    "xflip": (bool, int),
    "yflip": (bool, int),  # PDillis' fork
    "resolution": (int, type(None)),
    "random_seed": (int, type(None)),
}
MAX_TEXT = 4096
MAX_NAMED = 5


def known(record: "Mapping[Any, Any] | None") -> "tuple[dict[str, Any] | None, tuple[str, ...]]":
    """The part of a record that may be passed on, and what was left out.

    Args:
        record: `training_set_kwargs` of a file, plain values; None stays None.

    Returns:
        The record, and sentences on what it lost; none for the family's own files.
    """
    if record is None:
        return None, ()
    kept: dict[str, Any] = {}
    lost: list[str] = []
    for key, value in record.items():
        is_known = type(key) is str and type(value) in KINDS.get(key, ())
        if not is_known or (type(value) is str and len(value) > MAX_TEXT):
            lost.append(printable(str(key), 40))
        else:
            kept[key] = value
    notes = []
    if kept.get("class_name", CLASS_NAME) != CLASS_NAME:
        found = printable(kept["class_name"], 80)
        notes.append(f"its record of the data set names the class {found!r}, replaced by {CLASS_NAME}")
    if "class_name" in kept:
        kept["class_name"] = CLASS_NAME
    if lost:
        names = ", ".join(lost[:MAX_NAMED]) + (f" and {len(lost) - MAX_NAMED} more" if len(lost) > MAX_NAMED else "")
        notes.append(f"its record of the data set has entries of no known kind, left out: {names}")
    return kept, tuple(notes)
