"""The manifest of a checkpoint: size and checksum of each of its files.

manifest.json  {"files": {"config.json": {"bytes": 812, "crc32": "0a1b2c3d"}, ...}}
A CRC-32 finds what a disk or a copy does to a file by accident; it is no signature.
"""

import json
import zlib
from pathlib import Path

NAME = "manifest.json"
Entry = dict[str, int | str]
_CHUNK = 1 << 22


def entry(path: Path) -> Entry:
    """Size in bytes and CRC-32 of the file at `path`, read in pieces of 4 MiB."""
    size, checksum = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            size += len(chunk)
            checksum = zlib.crc32(chunk, checksum)
    return {"bytes": size, "crc32": f"{checksum:08x}"}


def write(folder: Path, files: dict[str, Entry]) -> None:
    """Put the manifest of `files`, by their paths below `folder`, into `folder`."""
    text = json.dumps({"files": files}, indent=1, sort_keys=True)
    (folder / NAME).write_text(text, "utf-8")


def read(folder: Path) -> dict[str, Entry]:
    """The files of a checkpoint by their paths below `folder`.

    Raises:
        ValueError: the manifest is missing, or is no manifest.
    """
    try:
        files = json.loads((folder / NAME).read_text("utf-8"))["files"]
        return {
            name: {key: wanted[key] for key in ("bytes", "crc32")} for name, wanted in files.items()
        }
    except OSError as error:
        raise ValueError(f"{folder / NAME} cannot be read: {error.strerror}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / NAME} is damaged: {error!r}") from error


def problem(path: Path, wanted: Entry) -> str | None:
    """The problem of the file at `path`; None if it is as it was written."""
    try:
        size = path.stat().st_size
        if size != wanted["bytes"]:
            return f"{path} is damaged: it has {size:,} bytes, {wanted['bytes']:,} were written"
        found = entry(path)["crc32"]
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    if found != wanted["crc32"]:
        return f"{path} is damaged: its CRC-32 is {found}, {wanted['crc32']} was written"
    return None
