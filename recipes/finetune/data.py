"""The samples of all sources as a dataset: read when they are needed, and left out, with a report, where broken."""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from mg_fast.engine.image_cache import picture_digest
from mg_fast.errors import MgFastError, shortened
from mg_fast.models.pictures import open_picture
from mg_fast.models.templates import IMAGE_TAG

from .config import ConfigError, SourceConfig
from .features import FeatureCache
from .index import SampleIndex, empty_index, index_file, read_item
from .labels import EncodedSample
from .order import EMPTY
from .samples import BadSample, SampleTurns, read_sample, words_of

# Broken samples that are told on the screen; the report has all of them.
_TOLD = 20

logger = logging.getLogger(__name__)


class SkippedSamples:
    """The report of samples that are left out: one line of JSON each, with the source, the index and the reason.

    A sample has one line, however often it is read, also where a run continues.

    Args:
        path: the file. Processes may append to it at the same time.
    """

    def __init__(self, path: Path):
        self.path, self._told = path, 0
        # The samples that the file names, and how many of its bytes were read for that.
        self._known: set[tuple[str, int]] = set()
        self._read = 0

    def add(self, source: str, index: int, reason: str) -> None:
        with open(self.path, "a+b") as file:
            # Some network file systems have no locks. There a line may come twice.
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            self._look(file)
            if (source, index) in self._known:
                return
            row = json.dumps({"file": source, "index": index, "reason": reason}, ensure_ascii=False)
            # Half of a surrogate, which UTF-8 cannot have, is escaped as JSON does it.
            file.write(f"{row}\n".encode("utf-8", "backslashreplace"))
        if self._told < _TOLD:
            self._told += 1
            more = f"; further ones are only in {self.path}" if self._told == _TOLD else ""
            logger.warning("%s: sample %d is left out: %s%s", source, index, shortened(reason), more)

    def count(self) -> int:
        """The number of samples that the file names."""
        with contextlib.suppress(FileNotFoundError), open(self.path, "rb") as file:
            self._look(file)
        return len(self._known)

    def _look(self, file) -> None:
        """Reads what was added to the file, by whomever."""
        file.seek(self._read)
        for line in file:
            # A process that was killed may have left half a line.
            with contextlib.suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                self._known.add((row["file"], row["index"]))
            self._read += len(line)


class FileSource:
    """The samples of a .json or .jsonl file.

    Attributes:
        name: what reports call it.
        config: its configuration.
        index: where its samples are, and which of them are broken.
    """

    def __init__(self, config: SourceConfig, *, plain: bool):
        self.name, self.config, self._file = config.name, config, None
        self.index: SampleIndex = index_file(config.file, partial(_check, config, plain))

    def read(self, index: int) -> Any:
        if self._file is None:
            # Opened on first use; the workers of a loader, which are forks, share the file and read by position.
            self._file = os.open(self.config.file, os.O_RDONLY)
        return read_item(self._file, self.index.offsets[index], self.index.sizes[index])

    def __getstate__(self):
        return {**vars(self), "_file": None}


class DatasetSource:
    """The rows of a Hugging Face dataset, whose files are read through memory maps.

    The attributes are those of `FileSource`.
    """

    def __init__(self, config: SourceConfig, *, plain: bool):
        try:
            import datasets
        except ImportError:
            raise ConfigError(f"data: {config.name} needs the package datasets: pip install datasets") from None
        self.name, self.config = config.name, config
        try:
            rows = dataset_rows(datasets, config)
        except Exception as error:  # The library raises errors of many kinds for a name that it cannot load.
            raise ConfigError(f"data: {config.name} cannot be loaded: {' '.join(str(error).split())}") from None
        if "conversations" not in rows.column_names:
            raise ConfigError(f"data: {config.name} has no column conversations, only {', '.join(rows.column_names)}")
        texts, undecoded = rows, _undecoded(rows.features.get("image"), datasets.Image)
        if undecoded is not None:
            # Pictures are decoded by this package, so that a broken one is a broken sample and no error of the library.
            rows = rows.cast_column("image", undecoded)
            # They are read when a row's turn comes. Here their tags stand for them.
            texts = rows.remove_columns("image")
        self._rows = rows
        self.index = empty_index()
        for number, row in enumerate(texts):
            if undecoded is not None:
                row = {**row, "image": [{}] * _tags(row)}
            try:
                paths = _check(config, plain, row)
                self.index.words.append(words_of(row))
                # Pictures that are no files count as different from each other.
                self.index.pictures.extend(map(hash, paths or [(number, i) for i in range(_tags(row))]))
            except BadSample as fault:
                self.index.faults[number] = str(fault)
                self.index.words.append(0)

    def read(self, index: int) -> Any:
        return self._rows[index]


def dataset_rows(datasets, config: SourceConfig):
    """The rows of a source by the package datasets: of a name or folder, or of a folder that `save_to_disk` wrote."""
    folder = Path(config.dataset)
    if (folder / "state.json").is_file():
        return datasets.load_from_disk(config.dataset)
    if (folder / "dataset_dict.json").is_file():
        return datasets.load_from_disk(config.dataset)[config.split]
    return datasets.load_dataset(config.dataset, config.subset, split=config.split)


def _undecoded(feature: Any, image: type) -> Any:
    """The feature of a column of pictures, or of lists of them, that leaves them undecoded; None for another column."""
    if isinstance(feature, image):
        return image(decode=False)
    return type(feature)(image(decode=False)) if isinstance(getattr(feature, "feature", None), image) else None


def _tags(row: Mapping) -> int:
    """The number of `<image>` tags in a row's texts, of whatever form the row is."""
    turns = row.get("conversations")
    turns = turns if isinstance(turns, (list, tuple)) else ()
    return sum(str(turn.get("value")).count(IMAGE_TAG) for turn in turns if isinstance(turn, Mapping))


def _check(config: SourceConfig, plain: bool, sample: Any) -> list[str]:
    """Raises BadSample where a sample, or a path of one of its pictures, is seen to be wrong without much work.

    Returns:
        The files of the pictures, as far as they are files.
    """
    paths = [
        str(place(config, picture)) for picture in read_sample(sample, plain=plain).pictures if isinstance(picture, str)
    ]
    for path in paths:
        if not os.path.isfile(path):
            raise BadSample(f"picture {shortened(path, 200)}: no such file")
    return paths


def place(config: SourceConfig, picture: str) -> Path:
    """The file that a sample's path means."""
    for old, new in config.rename.items():
        picture = picture.replace(old, new)
    return config.pictures / picture


def open_sources(configs: Sequence[SourceConfig], *, plain: bool) -> list[FileSource | DatasetSource]:
    """Reads all sources once, to find their samples; `plain` says that these are captions.

    Raises:
        ConfigError: a source cannot be read, or none of its samples can be used.
    """
    sources = []
    for config in configs:
        source = (FileSource if config.file is not None else DatasetSource)(config, plain=plain)
        if not any(source.index.words):
            reasons = "; ".join(f"{i}: {fault}" for i, fault in list(source.index.faults.items())[:3])
            reasons = f" ({reasons})" if reasons else ""
            raise ConfigError(f"{source.name}: none of its {len(source.index.words)} samples can be used{reasons}")
        sources.append(source)
    return sources


class FineTuneData(Dataset):
    """The samples that can be used, of all sources.

    An item is a dictionary: `row`, an EncodedSample, and `pictures`, a list with a dictionary for each picture: its
    `key`, and either `squared`, [HR, HR, 3] uint8, or, found in the cache, `queries` and `pyramid`. The item is None
    where a sample turns out to be broken only now; the report says why. It is None for `order.EMPTY`, too.

    Args:
        sources: from `open_sources`.
        encode: from turns to rows (`labels.encode_turns`).
        images: a MiniGeminiImageProcessor.
        skipped: the report.
        plain: the samples are captions.
        cache: features of pictures that were seen before.

    Attributes:
        lengths: words of every sample, negative without a picture.
    """

    def __init__(
        self,
        sources: Sequence[FileSource | DatasetSource],
        encode: Callable[[Sequence[tuple[str, str]]], EncodedSample],
        images,
        skipped: SkippedSamples,
        *,
        plain: bool,
        cache: FeatureCache | None = None,
    ):
        self._sources, self._encode, self._images = list(sources), encode, images
        self._skipped, self._plain, self._cache = skipped, plain, cache
        found = []
        for number, source in enumerate(sources):
            words = np.frombuffer(source.index.words, dtype=np.int64)
            usable = np.flatnonzero(words)
            found.append(np.stack([np.full(len(usable), number), usable, words[usable]]))
        self._source, self._index, self.lengths = np.concatenate(found, axis=1)

    def report_broken(self) -> int:
        """Reports the samples that are left out for their form; returns their number. One process of a run does it."""
        for source in self._sources:
            for index, fault in source.index.faults.items():
                self._skipped.add(source.name, index, fault)
        return sum(len(source.index.faults) for source in self._sources)

    @property
    def with_pictures(self) -> int:
        """The number of samples with pictures."""
        return int((self.lengths > 0).sum())

    @property
    def pictures(self) -> int:
        """The number of different pictures, by their paths."""
        found = [np.frombuffer(source.index.pictures, dtype=np.int64) for source in self._sources]
        return len(np.unique(np.concatenate(found)))

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, item: int) -> dict | None:
        if item == EMPTY:
            return None
        number, index = int(self._source[item]), int(self._index[item])
        source = self._sources[number]
        try:
            sample: SampleTurns = read_sample(source.read(index), plain=self._plain)
            # The text is checked first, because it takes less time than a picture.
            row = self._encode(sample.turns)
            return {"row": row, "pictures": [self._picture(source.config, picture) for picture in sample.pictures]}
        except BadSample as fault:
            reason = str(fault)
        except (MgFastError, OSError) as error:
            reason = f"picture: {error}"
        self._skipped.add(source.name, index, reason)
        return None

    def _picture(self, config: SourceConfig, picture: Any) -> dict:
        """What the model needs of a picture; see the class."""
        if isinstance(picture, Mapping):
            picture = picture.get("bytes") or picture.get("path")
            if picture is None:
                raise BadSample("picture: expected bytes or a path in the row, got neither")
        if isinstance(picture, str):
            path = place(config, picture)
            with open(path, "rb") as file:
                content, label = file.read(), shortened(str(path), 200)
        else:
            content, label = picture, None
        is_bytes = isinstance(content, (bytes, bytearray))
        image = None if is_bytes else open_picture(content, label=label)
        digest = hashlib.sha256(content).digest() if is_bytes else picture_digest(image)
        key = None
        if self._cache is not None:
            key = self._cache.key(digest)
            if (features := self._cache.read(key)) is not None:
                return {"key": key, "queries": features.queries, "pyramid": features.pyramid}
        if image is None:
            image = open_picture(content, label=label)
        return {"key": key, "squared": self._images.squared([image])[0]}


def to_batch(items: Sequence[dict | None], *, pad_id: int) -> dict[str, Any]:
    """Rows of samples side by side, filled up on the right.

    Args:
        items: of `FineTuneData`; None is left out. If nothing is left, the batch has one row without anything to learn.
        pad_id: the id that fills up.

    Returns:
        `input_ids`, `labels`, `attention_mask` and `mm_token_type_ids`, [B, L], and `pictures` as in the items, in the
        order of their places.
    """
    items = [item for item in items if item is not None]
    rows = [item["row"] for item in items] or [EncodedSample([pad_id, pad_id], [-100, -100], [0, 0])]
    longest = max(len(row.ids) for row in rows)

    def side_by_side(field: str, fill: int) -> torch.Tensor:
        return torch.tensor([getattr(row, field) + [fill] * (longest - len(row.ids)) for row in rows])

    mask = torch.tensor([[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in rows])
    return {
        "input_ids": side_by_side("ids", pad_id),
        "labels": side_by_side("labels", -100),
        "attention_mask": mask,
        "mm_token_type_ids": side_by_side("marks", 0),
        "pictures": [picture for item in items for picture in item["pictures"]],
    }
