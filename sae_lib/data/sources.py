"""Where text comes from: embedded corpora, local files, data sets of the hub. Each source yields documents."""

from __future__ import annotations

import bz2
import html
import io
import json
import random
import re
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from sae_lib import params
from sae_lib.data import assets, newsgroups, tiny_model
from sae_lib.params import Extract, ParameterError

SHUFFLE_BUFFER = 4096
"""Documents held to be yielded in random order."""
SUFFIXES = (".txt", ".jsonl", ".parquet")
HUB = {"wikitext": "Salesforce/wikitext:wikitext-103-raw-v1", "wmdp_bio": "cais/wmdp-bio-forget-corpus"}
"""Short names for data sets of the hub; what follows a colon is the configuration. The second one is gated there."""


def documents(name: str, p: Extract) -> Iterator[str]:
    """Non-empty documents of one source in a random order fixed by ``corpus_seed``.

    ``name`` is an alias (news, wikipedia, newsgroups_<topic>, tiny), a local file or folder, or a hub data set, which
    is streamed (``owner/name``, or ``owner/name:configuration``; wikitext and wmdp_bio are short names of two).
    Raises ParameterError naming ``corpus`` for a source that cannot be read.
    """
    if name == "tiny":
        return tiny_model.documents(p.corpus_seed)
    embedded = {"news": _news, "wikipedia": _wikipedia}
    path = params.local_path(name)
    if name in embedded:
        texts = embedded[name]()
    elif newsgroups.is_alias(name):
        texts = newsgroups.texts(name)
    elif path:
        texts = _local(path, p)
    else:
        texts = _hub(HUB.get(name, name), p)
    return _shuffled((text for text in texts if text.strip()), random.Random(f"{name} {p.corpus_seed}"))


def _shuffled(texts: Iterator[str], draw: random.Random) -> Iterator[str]:
    held = list(islice(texts, SHUFFLE_BUFFER))
    draw.shuffle(held)
    for text in texts:
        place = draw.randrange(len(held))
        yield held[place]
        held[place] = text
    yield from held


# -- embedded ----------------------------------------------------------------------------------------------------

def _news() -> Iterator[str]:
    """3,824 news articles of 2017."""
    import pandas as pd

    inner = zipfile.ZipFile(io.BytesIO(assets.member("news", "data/en/NewsArticles.zip")))
    table = pd.read_csv(inner.open("NewsArticles.csv"), usecols=["text"], encoding="utf-8")
    yield from table["text"].dropna()


def _wikipedia() -> Iterator[str]:
    """106 English Wikipedia articles without their markup."""
    raw = bz2.decompress(assets.member("wikipedia", "pages-articles1.xml-p000000010p000030302-shortened.bz2"))
    space = raw[:200].partition(b'xmlns="')[2].partition(b'"')[0].decode()
    for _, page in ElementTree.iterparse(io.BytesIO(raw)):
        if page.tag != f"{{{space}}}page":
            continue
        text = page.findtext(f".//{{{space}}}text") or ""
        if page.findtext(f"{{{space}}}ns") == "0" and not text.lower().startswith("#redirect"):
            yield plain_text(text)
        page.clear()


_NESTED = (re.compile(r"\{\{[^{}]*\}\}"), re.compile(r"\{\|.*?\|\}", re.S))
_FILES = re.compile(r"\[\[(?:File|Image|Category)\s*:(?:[^\[\]]|\[\[[^\[\]]*\]\]|\[[^\[\]]*\])*\]\]", re.I)
_MARKUP = ((re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]"), r"\1"),
           (re.compile(r"\[\w+://[^\s\]]*\s*([^\]]*)\]"), r"\1"),
           (re.compile(r"</?\w[^<>]*>"), ""),
           (re.compile(r"'{2,}"), ""),
           (re.compile(r"^=+\s*(.*?)\s*=+\s*$", re.M), r"\1"),
           (re.compile(r"^[*#:;|!]+\s*", re.M), ""),
           (re.compile(r"[ \t]+"), " "),
           (re.compile(r"\n\s*\n+"), "\n\n"))


def plain_text(wiki: str) -> str:
    """Wikipedia's markup removed: no templates, tables, files, references; links by their text."""
    text = html.unescape(wiki)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r"<(ref|math|gallery|timeline|nowiki)\b[^<>]*/>", "", text)
    text = re.sub(r"<(ref|math|gallery|timeline)\b[^<>]*>.*?</\1>", "", text, flags=re.S)
    for pattern in _NESTED:  # innermost first
        found = 1
        while found:
            text, found = pattern.subn("", text)
    text = _FILES.sub("", text)
    for pattern, by in _MARKUP:
        text = pattern.sub(by, text)
    return text.strip()


# -- local and hub -----------------------------------------------------------------------------------------------

def _local(path: Path, p: Extract) -> Iterator[str]:
    """Documents of a file (.txt at blank lines, .jsonl, .parquet), a folder of them, or a saved data set."""
    if path.is_dir() and ((path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()):
        yield from _saved_dataset(path, p)
        return
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES and f.is_file())
    if not files or files[0].suffix not in SUFFIXES:
        raise ParameterError(f"corpus: {path} holds no text that can be read; wanted {', '.join(SUFFIXES)} files, a "
                             "folder of them, or a folder that datasets' save_to_disk wrote")
    readers = {".txt": _text_file, ".jsonl": _jsonl_file, ".parquet": _parquet_file}
    for file in files:
        try:
            yield from readers[file.suffix](file, p)
        except (OSError, UnicodeDecodeError) as error:
            raise ParameterError(f"corpus: {file} cannot be read ({error})") from None


def _text_file(file: Path, _: Extract) -> Iterator[str]:
    lines: list[str] = []
    with file.open(encoding="utf-8", errors="replace") as handle:
        for line in handle:
            if line.strip():
                lines.append(line)
            elif lines:
                yield "".join(lines).rstrip("\n")
                lines = []
    yield "".join(lines).rstrip("\n")


def _jsonl_file(file: Path, p: Extract) -> Iterator[str]:
    with file.open(encoding="utf-8") as handle:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                raise ParameterError(f"corpus: {file}, line {number}: not JSON") from None
            yield _text_of(row, p, f"{file}, line {number}")


def _parquet_file(file: Path, p: Extract) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        if p.corpus_column not in table.schema_arrow.names:
            _text_of(dict.fromkeys(table.schema_arrow.names), p, str(file))
        for batch in table.iter_batches(batch_size=1024, columns=[p.corpus_column]):
            for value in batch.column(0).to_pylist():
                yield _text_of({p.corpus_column: value}, p, str(file))
    except (pyarrow.ArrowException, OSError) as error:
        raise ParameterError(f"corpus: {file} is not a whole parquet file ({error})") from None


def _saved_dataset(path: Path, p: Extract) -> Iterator[str]:
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # a damaged one raises a dozen kinds
        raise ParameterError(f"corpus: {path} is not a whole data set that save_to_disk wrote ({error})") from None
    if isinstance(found, datasets.DatasetDict):
        if p.corpus_split not in found:
            raise ParameterError(f"corpus_split: {path} has no split '{p.corpus_split}'; it has {', '.join(found)}")
        found = found[p.corpus_split]
    yield from (_text_of(row, p, str(path)) for row in found)


def _hub(name: str, p: Extract) -> Iterator[str]:
    import datasets

    try:
        data, _, configuration = name.partition(":")
        chosen = (data, configuration) if configuration else (data,)
        rows = iter(datasets.load_dataset(*chosen, split=p.corpus_split, streaming=True))
        first = next(rows, None)
    except Exception as error:  # the hub's client raises a dozen kinds
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise ParameterError(f"corpus: '{name}' is no alias (news, wikipedia, newsgroups_<topic>, tiny), no file or "
                             f"folder here, and the hub did not give it ({type(error).__name__}: {reason})") from None
    if first is not None:
        yield _text_of(first, p, name)
        yield from (_text_of(row, p, name) for row in rows)


def _text_of(row, p: Extract, where: str) -> str:
    value = row.get(p.corpus_column) if isinstance(row, dict) else None
    if isinstance(value, str):
        return value
    if isinstance(row, dict) and p.corpus_column in row and value is None:
        return ""
    columns = ", ".join(row) if isinstance(row, dict) else f"a {type(row).__name__}, not an object"
    raise ParameterError(f"corpus_column: {where} has no text in a column '{p.corpus_column}'; it has {columns}")
