"""What data are refused with, and names as a terminal can show them."""


class DataError(Exception):
    """Data that cannot be trained on; the message says what was looked for and where."""


class Unreadable(DataError):
    """Pictures that cannot be read, where others may be."""


class Unreachable(DataError):
    """A part of a dataset cannot be had: other pictures are not tried in its place, each after the same wait."""


class DataWarning(UserWarning):
    """Data that can be used, but not as they stand; the message says what was done."""


def printable(text: object) -> str:
    """The text in one line of visible characters: a file name may hold newlines, escape sequences or any bytes."""
    return "".join(c if c.isprintable() else _escaped(c) for c in str(text))


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # how Python writes a byte of a name that is no UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def counted(count: int, thing: str, things: str = "") -> str:
    """``counted(2, "file")`` is ``"2 files"``."""
    return f"{count} {thing if count == 1 else things or thing + 's'}"
