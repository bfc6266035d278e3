"""Token shards: every document is tokenized once and stored in flat arrays of token ids.

    DIR/{source}/train-00000.npy, train-00001.npy, ..., validation-00000.npy, ..., manifest.json
    DIR/{source}/train-00000.offsets.npy, ...    first token of each document

A document is <s> tokens </s>, and documents are concatenated. The shards are plain .npy files,
memory-mapped: any window of tokens can be read directly, without a library, and the sequence length
can change without tokenizing again. (A record format such as ArrayRecord fixes the record, and with
it the sequence length.)

The manifest is written last: a source with a manifest is complete. If its manifest has other
settings, another tokenizer or other files, the source is re-tokenized and swapped in atomically.
Until then its shards are in DIR/{source}~partial, where progress.json lists the finished ones; an
interrupted preparation resumes there.
"""

import os
import shutil
import sys
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from mooshak.config.sections import Config, SourceConfig
from mooshak.corpus.filters import in_validation
from mooshak.corpus.readers import documents, input_state, same_input
from mooshak.data.manifest import (
    add_offsets,
    damage,
    has_offsets,
    is_manifest_of,
    read_json,
    read_manifest,
    write_array,
    write_json,
    write_offsets,
)
from mooshak.data.progress import progress_bar
from mooshak.errors import InputError
from mooshak.files import locked
from mooshak.tokenizer import train
from mooshak.tokenizer.base import Tokenizer

SPLITS = ("train", "validation")

NO_OFFSETS = "the shards have no document offsets, which data.document_mask needs"

# Characters tokenized per call, while the next are read; more would not fit into the CPU caches.
_BATCH = 250_000


def load_or_prepare_shards(
    config: Config, progress: bool = True
) -> tuple[Tokenizer, dict[str, dict[str, Any]]]:
    """Return the tokenizer and the manifest of every source; prepare those that are missing.

    Any number of processes may call it concurrently: one prepares, the others wait and reuse its
    files. Progress is reported on standard error; standard output is for results.
    """
    tokenizer = train.load_or_train_tokenizer(config)
    return tokenizer, prepare(config, tokenizer, progress)


def open_shards(config: Config) -> Tokenizer:
    """Return the tokenizer of a configuration; prepare sources that are absent, and change nothing.

    Raises `InputError` if the tokenizer is missing, or the shards of a source are not those of the
    configuration: a command that only reads neither trains a tokenizer nor writes data again.
    """
    path = Path(config.tokenizer.path)
    if not path.exists():
        raise InputError(
            f"tokenizer {path} is missing; name the tokenizer of the checkpoint with "
            "--tokenizer.path"
        )
    tokenizer = train.load_or_train_tokenizer(config)
    for source in config.data.sources:
        reason = _stale(source, config, tokenizer)
        if reason and (Path(config.data.dir) / source.name).exists():
            raise InputError(
                f"source {source.name}: {reason}; run `python -m mooshak.data prepare`, "
                "or name another --data.dir"
            )
    prepare(config, tokenizer)
    return tokenizer


def prepare(
    config: Config, tokenizer: Tokenizer, progress: bool = True
) -> dict[str, dict[str, Any]]:
    """Tokenize the sources that are not prepared yet; return the manifests by source."""
    sources = config.data.sources
    # Complete sources need no lock: they may be on a read-only disk.
    if any(_stale(source, config, tokenizer) for source in sources):
        with locked(Path(config.data.dir) / ".lock"):
            for source in sources:
                reason = _stale(source, config, tokenizer)
                directory = Path(config.data.dir) / source.name
                ids = tokenizer.bos_id, tokenizer.eos_id
                if reason == NO_OFFSETS and add_offsets(directory, *ids):
                    continue
                if reason:
                    if progress:
                        print(f"source {source.name}: {reason}; tokenizing", file=sys.stderr)
                    _prepare_source(source, config, tokenizer, progress)
    return {source.name: read_manifest(Path(config.data.dir) / source.name) for source in sources}


class TokenShards:
    """The tokens of a split of a source as one array, memory-mapped."""

    def __init__(self, directory: str | Path, split: str) -> None:
        self.directory, self.split = Path(directory), split
        self._shards = []
        self._offsets = []
        for shard in read_manifest(self.directory)["shards"]:
            if shard["split"] == split:
                if reason := damage(self.directory, shard):
                    raise InputError(
                        f"{reason}; run `python -m mooshak.data prepare --config FILE` to repair it"
                    )
                tokens = np.load(self.directory / shard["file"], mmap_mode="r")
                self._shards.append(tokens.view(np.ndarray))  # A plain array is faster to slice.
                if "offsets" in shard:
                    offsets = np.load(self.directory / shard["offsets"]["file"], mmap_mode="r")
                    self._offsets.append(offsets.view(np.ndarray))
        self._starts = list(accumulate(map(len, self._shards), initial=0))

    def __reduce__(self) -> tuple:
        # A memory map is pickled by content; another process opens the files instead.
        return TokenShards, (self.directory, self.split)

    def __len__(self) -> int:
        """Return the number of tokens."""
        return self._starts[-1]

    @property
    def has_offsets(self) -> bool:
        """True if the starts of the documents are known, which `segments` needs."""
        return len(self._offsets) == len(self._shards)

    def window(self, start: int, length: int) -> np.ndarray:
        """Return tokens start .. start + length - 1, int32 [length], across shards."""
        result = np.empty(length, np.int32)
        for index, offset, here in self._overlaps(start, length):
            result[here] = self._shards[index][offset : offset + here.stop - here.start]
        return result

    def segments(self, start: int, length: int) -> np.ndarray:
        """Return the document of each token of a window, numbered from 1, int32 [length]."""
        is_first = np.zeros(length, np.int32)
        for index, offset, here in self._overlaps(start, length):
            offsets = self._offsets[index]
            first, last = np.searchsorted(offsets, (offset, offset + here.stop - here.start))
            is_first[offsets[first:last] + (here.start - offset)] = 1
        is_first[:1] = 1  # The window may start within a document.
        return np.cumsum(is_first, dtype=np.int32)

    def _overlaps(self, start: int, length: int) -> Iterator[tuple[int, int, slice]]:
        """Yield shard, offset in the shard and slice of the window, for each shard in a window."""
        if not 0 <= start <= start + length <= len(self):
            raise IndexError(f"window {start} + {length} of {len(self)} tokens")
        done, index = 0, bisect_right(self._starts, start) - 1
        while done < length:
            end = min(length, self._starts[index + 1] - start)
            yield index, start + done - self._starts[index], slice(done, end)
            done, index = end, index + 1


def _settings(source: SourceConfig, config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return everything that the shards of a source depend on, but the text."""
    of_source = asdict(source)
    for key in ("name", "weight"):  # These change the mixture, not the tokens.
        del of_source[key]
    cleaning = ("normalize_nfc", "drop_empty", "deduplicate")
    return {
        "format_version": 1,
        "tokenizer": tokenizer.fingerprint,
        "source": of_source,
        "cleaning": {key: getattr(config.data, key) for key in cleaning},
        "validation_fraction": config.data.validation_fraction,
        "shard_tokens": config.data.shard_tokens,
    }


def _identity(source: SourceConfig, config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return everything that the shards of a source depend on."""
    return {**_settings(source, config, tokenizer), "input": input_state(source)}


def _stale(source: SourceConfig, config: Config, tokenizer: Tokenizer) -> str | None:
    """Return why a source has to be tokenized, or None if its shards are valid."""
    directory = Path(config.data.dir) / source.name
    try:
        manifest = read_json(directory / "manifest.json")
    except FileNotFoundError:
        return "not prepared yet"
    except ValueError:
        return "the manifest is damaged"
    for key, value in _settings(source, config, tokenizer).items():
        if manifest.get(key) != value:
            return f"the shards in {directory} were prepared with another {key}"
    if not same_input(source, manifest.get("input")):
        return f"the text of {source.path or 'the tales'} has changed since it was prepared"
    for shard in manifest["shards"]:
        if reason := damage(directory, shard):
            return reason
    return NO_OFFSETS if config.data.document_mask and not has_offsets(manifest) else None


def _prepare_source(
    source: SourceConfig, config: Config, tokenizer: Tokenizer, progress: bool
) -> None:
    """Tokenize a source in its ~partial directory, then rename it."""
    directory = Path(config.data.dir) / source.name
    partial, old = (directory.with_name(f"{source.name}~{state}") for state in ("partial", "old"))
    identity = _identity(source, config, tokenizer)
    begun = is_manifest_of(partial / "progress.json", identity)
    if is_manifest_of(directory / "manifest.json", identity) and not begun:
        # Valid shards, some of them damaged: continue from copies of the good ones.
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(directory, partial, copy_function=_link)
    done = _finished_shards(partial, identity, config.data.document_mask)
    if not done:
        shutil.rmtree(partial, ignore_errors=True)
    elif progress:
        print(f"source {source.name}: {len(done)} finished shards are reused", file=sys.stderr)
    partial.mkdir(parents=True, exist_ok=True)
    for shard in _write_shards(source, config, tokenizer, partial, done, progress):
        done.append(shard)
        write_json(partial / "progress.json", {**identity, "shards": done})
    if not done:
        raise InputError(f"source {source.name} has no documents; check its path and column")
    done.sort(key=lambda shard: shard["file"])
    write_json(partial / "manifest.json", {**identity, "shards": done})
    known = {"manifest.json", *(shard["file"] for shard in done)}
    known |= {shard["offsets"]["file"] for shard in done if "offsets" in shard}
    for path in partial.iterdir():
        if path.name not in known:  # progress.json, and files of an interrupted write.
            path.unlink()
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        os.replace(directory, old)
    os.replace(partial, directory)
    shutil.rmtree(old, ignore_errors=True)


def _link(source: str, target: str) -> None:
    """Copy a file as a hard link where the file system has them: shards are large."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _finished_shards(
    partial: Path, identity: dict[str, Any], need_offsets: bool
) -> list[dict[str, Any]]:
    """Return the shards that an interrupted run finished: up to the first bad one of a split."""
    name = "progress.json" if (partial / "progress.json").exists() else "manifest.json"
    if not is_manifest_of(partial / name, identity):
        return []
    good, bad = [], set()
    for shard in read_json(partial / name)["shards"]:
        complete = "offsets" in shard or not need_offsets
        if complete and shard["split"] not in bad and damage(partial, shard, checksum=True) is None:
            good.append(shard)
        else:
            bad.add(shard["split"])
    return good


@dataclass
class _Split:
    """The current shard of a split."""

    name: str
    index: int = 0
    skip: int = 0
    """Documents of the source, of either split, up to the last finished shard of this split."""
    arrays: list[np.ndarray] = field(default_factory=list)
    tokens: int = 0
    bytes: int = 0

    def write(self, directory: Path, documents_read: int) -> dict[str, Any]:
        """Write the shard and the offsets of its documents; return its entry in the manifest."""
        path = directory / f"{self.name}-{self.index:05d}.npy"
        shard: dict[str, Any] = {
            "split": self.name,
            "tokens": self.tokens,
            "documents": len(self.arrays),
            "bytes": self.bytes,
            **write_array(path, np.concatenate(self.arrays)),
            "documents_read": documents_read,
        }
        lengths = [len(array) for array in self.arrays]
        shard["offsets"] = write_offsets(path, np.cumsum([0, *lengths[:-1]]))
        return shard


def _write_shards(
    source: SourceConfig,
    config: Config,
    tokenizer: Tokenizer,
    directory: Path,
    done: list[dict[str, Any]],
    progress: bool,
) -> Iterator[dict[str, Any]]:
    """Write the shards that are not in `done`; yield the manifest entry of each when written."""
    dtype = np.dtype(np.uint32 if tokenizer.vocab_size > 65535 else np.uint16)
    splits = {}
    for name in SPLITS:
        mine = [shard for shard in done if shard["split"] == name]
        splits[name] = _Split(name, len(mine), mine[-1]["documents_read"] if mine else 0)

    skips = {name: split.skip for name, split in splits.items()}

    def choose(first: int, texts: list[str]) -> list[tuple[int, str, str]]:
        """Return number, split and text of the documents that are in no finished shard."""
        chosen = []
        for number, text in enumerate(texts, first + 1):
            name = SPLITS[in_validation(text, config.data.validation_fraction)]
            if number > skips[name]:
                chosen.append((number, name, text))
        return chosen

    def encode(batch: tuple[int, list[str]]) -> _Encoded:
        """Encode a batch in a thread; the tokenizer releases the GIL while the next is read."""
        chosen = choose(*batch)
        texts = [text for _, _, text in chosen]
        return batch, chosen, pool.submit(tokenizer.encode_batch, texts, os.cpu_count() or 1)

    read = 0
    batches = map(encode, _batches(documents(source, config)))
    with ThreadPoolExecutor(1) as pool, progress_bar(source, progress) as advance:
        for (first, texts), chosen, future in _one_ahead(batches):
            read, encoded = first + len(texts), future.result()
            for (number, name, text), ids in zip(chosen, encoded, strict=True):
                split = splits[name]
                split.arrays.append(np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], dtype))
                split.tokens += len(split.arrays[-1])
                split.bytes += len(text.encode())
                if split.tokens >= config.data.shard_tokens:
                    yield split.write(directory, number)
                    splits[name] = _Split(name, split.index + 1)
            advance(len(texts), sum(len(ids) for ids in encoded))
        for split in list(splits.values()):
            if split.arrays:
                yield split.write(directory, read)


def _batches(texts: Iterator[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield lists of documents, each with the number of documents before it."""
    first, batch, size = 0, [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH:
            yield first, batch
            first, batch, size = first + len(batch), [], 0
    if batch:
        yield first, batch


_Encoded = tuple[tuple[int, list[str]], list[tuple[int, str, str]], Future[list[list[int]]]]
"""A batch of documents, the chosen ones, and the future of their token ids."""


def _one_ahead(items: Iterator[_Encoded]) -> Iterator[_Encoded]:
    """Yield the items one step late: the next one is already being computed."""
    waiting: deque[_Encoded] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting
