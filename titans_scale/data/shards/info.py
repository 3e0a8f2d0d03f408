"""What a folder of token shards holds, in words."""

from pathlib import Path

from titans_scale.data.shards.index import INDEX_NAME, ShardIndex, load_index
from titans_scale.data.shards.journal import JOURNAL_NAME, Journal


def split_folders(folder: str | Path) -> list[Path]:
    """The splits below a folder, finished and unfinished, sorted by name; or the folder itself, if it is a split.

    Raises:
        ValueError: there is none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; name one that tools/make_shards.py wrote")
    found = sorted({file.parent for name in (INDEX_NAME, JOURNAL_NAME) for file in (*folder.glob(name), *folder.glob(f"*/{name}"))})
    if not found:
        raise ValueError(f"there are no token shards in {folder}; name a folder that tools/make_shards.py wrote")
    return found


def describe(folder: str | Path) -> str:
    """All that is known of the splits of a folder without reading a shard; of an unfinished one, how far it got.

    Raises:
        ValueError: there is no split, or an index is damaged.
    """
    splits = split_folders(folder)
    return "\n".join(_finished(split, load_index(split)) if (split / INDEX_NAME).exists() else _unfinished(split) for split in splits)


def summary(index: ShardIndex, *, members_left_out: int = 0) -> str:
    """A split in one line.

    Args:
        members_left_out: of the tars it was made of.
    """
    counts = {"documents": index.documents, "tokens": index.tokens, "samples": index.samples, "shards": len(index.shards)}
    left_out = {"documents that could not be read": index.skipped, "members of tars that are no documents": members_left_out}
    return ", ".join(f"{name} {count:,}" for name, count in (counts | left_out).items() if count or name in counts)


def _finished(split: Path, index: ShardIndex) -> str:
    settings, inputs = index.settings, index.inputs
    per_token = f"{index.text_bytes / index.tokens:.3f} a token" if index.text_bytes else "it was tokens already"
    division = f", {settings.validation_fraction:g} of all for validation" if settings.validation_fraction else ""
    facts = {
        "samples": f"{index.samples:,} of {settings.sequence_length:,} tokens, {settings.samples_per_shard:,} a shard",
        "tokens": f"{index.tokens:,}",
        "documents": f"{index.documents:,}{division}" + (f"; {index.skipped:,} could not be read" if index.skipped else ""),
        "text": f"{index.text_bytes:,} bytes, {per_token}",
        "shards": f"{len(index.shards):,}, {sum(shard.bytes for shard in index.shards):,} bytes",
        "dtype": f"{index.dtype}, vocabulary {index.vocab_size:,}, end of document {index.eos_id}",
        "tokenizer": f"{index.tokenizer}, {settings.tokenizer_fingerprint[:16]}",
        "inputs": f"{inputs.files:,} files, {inputs.bytes:,} bytes, from {inputs.first} on" if inputs else "a pipe or a program",
        "fingerprint": index.fingerprint,
    }
    return "\n".join([f"{split}", *(f"  {name:<12} {fact}" for name, fact in facts.items())])


def _unfinished(split: Path) -> str:
    journal = Journal.read(split)
    assert journal is not None
    at = journal.position
    documents = f", up to document {at.records + 1:,} of the input" if at else ""
    samples, tokens = sum(shard.samples for shard in journal.shards), sum(shard.tokens for shard in journal.shards)
    return (
        f"{split}\n  unfinished   {len(journal.shards):,} shards with {samples:,} samples, {tokens:,} tokens{documents};"
        " the command that began it goes on from there"
    )
