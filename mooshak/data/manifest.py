"""Manifest of a prepared source, and the array files that it lists.

    DIR/{source}/manifest.json
    DIR/{source}/train-00000.npy            tokens: complete documents, concatenated
    DIR/{source}/train-00000.offsets.npy    int64 [documents], first token of each document

An entry of `shards` lists the two files with their sizes and checksums; that of the offsets is
under `offsets`, which shards prepared by older versions do not have.
"""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from mooshak.errors import InputError
from mooshak.files import write_atomically


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return the manifest of a source. Raises `InputError` if the source is not prepared."""
    path = directory / "manifest.json"
    try:
        return read_json(path)
    except FileNotFoundError:
        raise InputError(
            f"{path} is missing; create it with `python -m mooshak.data prepare --config FILE`"
        ) from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); delete it and prepare again") from error


def totals(manifest: dict[str, Any], *splits: str) -> dict[str, int]:
    """Return the numbers of tokens, documents and bytes of text in some splits."""
    shards = [shard for shard in manifest["shards"] if shard["split"] in splits]
    return {key: sum(shard[key] for shard in shards) for key in ("tokens", "documents", "bytes")}


def shards_description(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return what identifies the training tokens of a source: their number and checksum."""
    shards = [shard for shard in manifest["shards"] if shard["split"] == "train"]
    checksums = "".join(shard.get("sha256", "") for shard in shards)
    return {
        **{key: sum(shard[key] for shard in shards) for key in ("documents", "tokens")},
        "shard_tokens": manifest.get("shard_tokens"),
        "sha256": hashlib.sha256(checksums.encode()).hexdigest(),
    }


def has_offsets(manifest: dict[str, Any]) -> bool:
    """Return True if every shard has document offsets."""
    return all("offsets" in shard for shard in manifest["shards"])


def is_manifest_of(path: Path, identity: dict[str, Any]) -> bool:
    """Return whether a manifest or progress file exists, is readable, and has this identity."""
    try:
        found = read_json(path)
    except (FileNotFoundError, ValueError):
        return False
    return {key: found.get(key) for key in identity} == identity


def damage(directory: Path, shard: dict[str, Any], checksum: bool = False) -> str | None:
    """Return what is wrong with the files of a shard, or None; a `checksum` reads them in full."""
    reason = _file_damage(directory, shard, shard["tokens"], checksum)
    if reason is None and "offsets" in shard:
        reason = _file_damage(directory, shard["offsets"], shard["documents"], checksum)
    return reason


def _file_damage(directory: Path, entry: dict[str, Any], length: int, checksum: bool) -> str | None:
    path = directory / entry["file"]
    try:
        array = np.load(path, mmap_mode="r")
    except FileNotFoundError:
        return f"shard {path} is missing"
    except (ValueError, EOFError, OSError):
        return f"shard {path} is truncated or not an .npy file"
    if array.shape != (length,) or array.dtype != entry["dtype"]:
        return f"shard {path} is not the one in the manifest"
    if path.stat().st_size != entry["file_bytes"]:
        return f"shard {path} does not have the size in the manifest"
    if checksum and hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
        return f"shard {path} does not have the checksum in the manifest"
    return None


def write_array(path: Path, array: np.ndarray) -> dict[str, Any]:
    """Write an .npy file atomically; return its entry in the manifest."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    content = buffer.getvalue()
    write_atomically(path, content)
    return {
        "file": path.name,
        "dtype": array.dtype.name,
        "file_bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def write_offsets(token_file: Path, offsets: np.ndarray) -> dict[str, Any]:
    """Write the document offsets of a shard next to its tokens; return their entry."""
    return write_array(token_file.with_suffix(".offsets.npy"), offsets.astype(np.int64))


def add_offsets(directory: Path, bos_id: int, eos_id: int) -> bool:
    """Add document offsets to the shards of a source that have none, from their BOS tokens.

    Every document starts with one BOS, and ends with another if that is also EOS. If a shard has
    just as many of them, they show the starts. Otherwise, or if it is damaged, the starts are
    unknown: return False, with the manifest unchanged.
    """
    manifest = read_manifest(directory)
    per_document = 2 if bos_id == eos_id else 1
    for shard in manifest["shards"]:
        if "offsets" in shard:
            continue
        if damage(directory, shard, checksum=True):
            return False
        path = directory / shard["file"]
        found = np.flatnonzero(np.load(path, mmap_mode="r") == bos_id)
        if len(found) != per_document * shard["documents"]:
            return False
        shard["offsets"] = write_offsets(path, found[::per_document])
    write_json(directory / "manifest.json", manifest)
    return True


def read_json(path: Path) -> dict[str, Any]:
    """Read a manifest or progress file. Raises `ValueError` if it is neither."""
    content = json.loads(path.read_text("utf-8"))
    if not isinstance(content, dict) or "shards" not in content:
        raise ValueError("not a manifest")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a manifest or progress file atomically."""
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
