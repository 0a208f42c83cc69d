"""Whether bytes of a format without code are a pickle as well. Walks over opcodes; interprets and executes nothing.

Readers differ in which damage they forgive, so the walk forgives all of it: no stack, no memo, no framing. What it
calls harmless, no unpickler can act on: to act, one has to import a name, and a name has to stand in the bytes.
"""

import pickletools

MAX_OPCODES = 10_000  # numbers that all happen to be opcodes for so long are none
MAX_NAME = 1000
_LENGTHS = {  # bytes of the length in front of an argument
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
_LINES = {"stringnl": 1, "stringnl_noescape": 1, "stringnl_noescape_pair": 2, "unicodestringnl": 1,
          "decimalnl_short": 1, "decimalnl_long": 1, "floatnl": 1}  # fmt: skip
_OPCODES = {ord(opcode.code): opcode for opcode in pickletools.opcodes}


def imported_name(data: bytes) -> "str | None":
    """What an ordinary unpickler that is given these bytes could be made to import first; None if nothing.

    Args:
        data: the whole file.

    Returns:
        `module.name`, or a description where the name comes from a stack that is not followed here.
    """
    position, has_text = 0, False
    for _ in range(MAX_OPCODES):
        opcode = _OPCODES.get(data[position]) if position < len(data) else None
        if opcode is None:
            return None
        found = _argument(data, position + 1, opcode.arg)
        if found is None:
            return None
        position, pieces = found
        if opcode.name in ("GLOBAL", "INST"):
            if not all(map(_is_name, pieces)):
                return None  # no module has such a name: the unpickler ends here
            return ".".join(piece.decode() for piece in pieces)
        has_text = has_text or any(map(_is_name, pieces))
        if opcode.name == "STACK_GLOBAL" and has_text:
            return "a name from its stack"
    return f"something after {MAX_OPCODES} opcodes"


def _argument(
    data: bytes, start: int, kind: "pickletools.ArgumentDescriptor | None"
) -> "tuple[int, list[bytes]] | None":
    """Where an opcode's argument ends, and its lines or text; None if the data ends before."""
    if kind is None:
        return start, []
    if kind.name in _LINES:
        pieces = []
        for _ in range(_LINES[kind.name]):
            end = data.find(b"\n", start)
            if end < 0:
                return None
            pieces.append(data[start : min(end, start + MAX_NAME + 1)].strip(b"\r'\""))
            start = end + 1
        return start, pieces
    if kind.n >= 0:
        return (start + kind.n, []) if start + kind.n <= len(data) else None
    width = _LENGTHS[kind.n]
    end = start + width + int.from_bytes(data[start : start + width], "little")
    return (end, [data[start + width : min(end, start + width + MAX_NAME + 1)]]) if end <= len(data) else None


def _is_name(text: bytes) -> bool:
    """Whether a module or something in one can be called so."""
    try:
        return 0 < len(text) <= MAX_NAME and text.decode().isprintable()
    except UnicodeDecodeError:
        return False
