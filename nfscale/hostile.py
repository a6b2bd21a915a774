"""What strangers wrote, made safe to show and to keep: names as ids, errors as reasons."""

import re

_ESCAPED = re.compile("[\\\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def escaped(name: str) -> str:
    r"""A file's name as an id: valid UTF-8, printable, and different for different names.

    A backslash is written `\\`, a byte that is not UTF-8 `\xe9`, a control character `\u000a`; all else stays.
    """

    def escape(match: re.Match[str]) -> str:
        code = ord(match[0])
        if match[0] == "\\":
            return r"\\"
        return rf"\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else rf"\u{code:04x}"

    return _ESCAPED.sub(escape, name)


def escaped_path(path: str) -> str:
    """A path as an id: as `escaped`, and without the parts that would lead elsewhere or nowhere."""
    parts = [rf"\u{ord(part[0]):04x}" * len(part) if part in (".", "..") else escaped(part) for part in path.split("/")]
    return "/".join([part or r"\u002f" for part in parts])


def reason_of(error: BaseException) -> str:
    """An error as one sentence for a row: without the machine's paths, without what a terminal would obey."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = text.split(": '")[0].split(" '/")[0]
    if "cannot identify image file" in text:
        return "not an image, or an image format that cannot be read"
    if isinstance(error, MemoryError):
        return "too large for the memory of this machine"
    if not isinstance(error, OSError | ValueError) or not text.strip():
        text = f"cannot be decoded: {type(error).__name__} {text}"
    return escaped(" ".join(text.split()))[:300]
