"""Tars that others wrote, made into shards of ours once and kept: order, packing, resume and checks are then those of any shards."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from titans_scale.config import DataConfig
from titans_scale.data.processes import available_cores
from titans_scale.data.reading.faults import ReadPolicy
from titans_scale.data.reading.store import cache_folder, fetch_file, is_remote
from titans_scale.data.shards.index import InputFiles
from titans_scale.data.shards.making import NoDocumentLeft, make_split, stamp
from titans_scale.data.text.inputs import Inputs, find_inputs, total_bytes
from titans_scale.data.tokenizers.loading import load_tokenizer

HELD_OUT = 0.005
"""Share of the documents that becomes the validation split where the tars do not tell."""
TARS = (".tar", ".tar.gz", ".tgz", ".tar.zst")


def shards_of_others(path: str, split: str, config: DataConfig, *, sequence_length: int) -> Path:
    """The folder of shards made of some tars, with this split in it. What is not there yet is made now, by one process of the machine.

    Args:
        path: folder with tars in train/ and validation/, or with tars alone; or tars, with {000..009} for many, also behind https:// or
            pipe:. Where the tars do not tell, HELD_OUT of the documents are the validation split, by a hash of each.
    Raises:
        ValueError: there are no tars, or one cannot be read; no document.   OSError: the cache cannot be written.
    """
    assert config.tokenizer is not None, "the configuration has seen to that"
    tokenizer, cache = load_tokenizer(config.tokenizer), cache_folder(config.cache_dir)
    policy = ReadPolicy.of(config)
    folders = Path(path)
    if not is_remote(path) and (folders / "train").is_dir():
        tars, held_out = list(_tars_in(folders / split)), 0.0
    elif not is_remote(path) and folders.is_dir():
        tars, held_out = list(_tars_in(folders)), HELD_OUT
    else:
        tars, held_out = [fetch_file(tar, cache / "tars", policy) if is_remote(tar) else Path(tar) for tar in _expanded(path)], HELD_OUT
    if not tars:
        raise ValueError(f"{folders / split if held_out == 0 else path} holds no tars; data.format webdataset needs some there")
    inputs = find_inputs(tars, format="webdataset", text_key=config.text_key)
    files = stamp(inputs)
    assert isinstance(files, InputFiles)
    made_of = [files.stamp, config.text_key, tokenizer.fingerprint, sequence_length, held_out, config.on_error]
    folder = cache / "made" / hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{split}.wait"), _bar(inputs, f"tokenizing {path}") as bar:
        try:
            make_split(
                inputs,
                folder / split,
                tokenizer=tokenizer,
                sequence_length=sequence_length,
                validation_fraction=held_out,
                on_bad_document=config.on_error,
                workers=available_cores(),
                on_read=bar.update,
            )
        except NoDocumentLeft as error:
            raise ValueError(f"{path} has too few documents to hold {held_out:.1%} out; lay its tars in train/ and validation/") from error
    return folder


def _tars_in(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.rglob("*")) if file.name.endswith(TARS))


def _expanded(path: str) -> list[str]:
    """Braces as webdataset knows them, each result a file."""
    from webdataset.shardlists import expand_urls  # imports torch

    return expand_urls(path)


def _bar(inputs: Inputs, what: str) -> tqdm:
    return tqdm(total=total_bytes(inputs), desc=what, unit="B", unit_scale=True, disable=None, delay=0.5)
