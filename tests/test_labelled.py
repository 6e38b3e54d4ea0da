"""Labelled texts: their labels, sizes and parts, read from small archives made like the pinned ones."""

import hashlib
import io
import tarfile
import zipfile

import pytest

from sae_lib.data import assets, labelled, newsgroups
from sae_lib.params import ParameterError

RATED = {"movieReviewSnippets": 60, "amazonReviewSnippets": 40, "tweets": 40, "nytEditorialSnippets": 40}


def packed(path, files):
    """A .tar.gz of ``files`` (name -> bytes)."""
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def rated(tmp_path, monkeypatch):
    """An archive as vaderSentiment's: four files of rated sentences inside another archive."""
    files = {}
    for name, count in RATED.items():
        rows = [f"{n}\t{(-1) ** n * (2.5 if n % 5 else 0.5)}\tA caf\xe9 &amp; its sentence number {n}, from {name}"
                for n in range(count)]
        files[f"hutto/{name}_GroundTruth.txt"] = "\r\n".join(rows).encode("latin-1")
    inner = packed(tmp_path / "inner.tar.gz", files).read_bytes()
    outer = packed(tmp_path / "outer.tar.gz", {"v/additional_resources/hutto_ICWSM_2014.tar.gz": inner, "v/x.py": b""})
    monkeypatch.setattr(assets, "archive", lambda name: {"sentiment": outer}[name])
    made = (labelled._rated, labelled.sentiment, labelled.sources, labelled.source_by_sentiment)
    for one in made:
        one.cache_clear()
    yield outer
    for one in made:
        one.cache_clear()


def whole(data):
    """What holds of every data set: known parts, texts once and long enough, the same again."""
    rows = data.rows
    assert set(rows.part) == {"train", "test"} and not rows.text.duplicated().any()
    assert (rows.text.str.len() >= labelled.SHORTEST).all() and (rows.text == rows.text.str.strip()).all()
    assert data.about
    return rows


def test_sentiment_and_sources_of_the_nested_archive(rated):
    rows = whole(labelled.sentiment())
    assert set(rows.label) == {"negative", "positive"} and len(rows) == sum(RATED.values()) * 4 // 5  # the weak are out
    assert rows.text.str.contains("caf\xe9 & its", regex=False).all()
    number = rows.text.str.extract(r"number (\d+)")[0].astype(int)
    assert ((number % 2 == 0) == (rows.label == "positive")).all()
    assert rows.part.equals(rows.text.map(labelled.part_of))
    assert set(whole(labelled.sources()).label) == set(labelled.SENTIMENTS)
    both = labelled.source_by_sentiment()
    assert set(whole(both).second) == set(both.second) and {one for pair in both.pairs for one in pair} <= set(
        both.rows["first"])


def test_a_damaged_archive_is_named(rated):
    rated.write_bytes(rated.read_bytes()[:200])
    with pytest.raises(assets.AssetError, match="'sentiment': .* is damaged"):
        labelled.sentiment()


def test_topics_and_languages(monkeypatch):
    monkeypatch.setattr(newsgroups, "texts", lambda name: (
        f"a post of the group {name}, the number of which is {n}" for n in range(30)))

    def member(_name, suffix):
        raw, language = io.BytesIO(), suffix.split("/")[1]
        with zipfile.ZipFile(raw, "w") as inner:
            lines = "".join(f'"x","a speech in {language}, long enough, and of number {n}"\n' for n in range(30))
            inner.writestr(f"{language}.csv", 'date,text\n"x","short"\n"x",\n' + lines)
        return raw.getvalue()

    monkeypatch.setattr(assets, "member", member)
    for made, labels in ((labelled.topics, labelled.TOPICS), (labelled.languages, labelled.LANGUAGES)):
        rows = whole(made.__wrapped__())
        assert rows.label.value_counts().to_dict() == dict.fromkeys(labels, 30)


def test_code_is_that_of_installed_files_and_no_file_is_in_both_parts(tmp_path, monkeypatch):
    for package, suffix in set(labelled.CODE.values()):
        for n in range(12):
            file = tmp_path / package / "deep" / f"file{n}{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            words = (f"{suffix} {n} " + hashlib.sha256(f"{n} {k}".encode()).hexdigest() for k in range(99))
            file.write_text("".join(words))

    class Found:
        def __init__(self, package):
            self.submodule_search_locations = [str(tmp_path / package)]

    monkeypatch.setattr(labelled.importlib.util, "find_spec", Found)
    rows = whole(labelled.code.__wrapped__())
    assert set(rows.label) == set(labelled.CODE) and rows.text.str.len().max() <= labelled.EXCERPT
    assert rows.label.value_counts().to_dict() == dict.fromkeys(labelled.CODE, 12 * labelled.EXCERPTS)
    monkeypatch.setattr(labelled.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ParameterError, match="package .* is not installed"):
        labelled.code.__wrapped__()


def test_a_sample_is_balanced_repeatable_and_as_large_as_there_is(rated):
    data = labelled.labelled("tiny_letters")
    rows = whole(data)
    train, test = data.sample(100, 40, 0)
    assert set(train) == set(test) == set(labelled.TINY_LETTERS)
    assert {len(texts) for texts in train.values()} == {50} and {len(texts) for texts in test.values()} == {20}
    assert data.sample(100, 40, 0) == (train, test) != data.sample(100, 40, 1)
    of = dict(zip(rows.text, zip(rows.label, rows.part)))
    assert all(of[text] == (label, "train") for label, texts in train.items() for text in texts)
    assert all(text.split()[0][0] == label for label, texts in train.items() for text in texts)
    few, _ = data.sample(10**6, 40, 0)
    assert len({len(texts) for texts in few.values()}) == 1
    assert len(few["a"]) == rows[rows.part == "train"].label.value_counts().min()


def test_crossed_texts_fit_what_saebench_asserts(rated):
    from sae_bench.evals.scr_and_tpp import dataset_creation
    from sae_bench.sae_bench_utils import dataset_info

    data = labelled.crossed("tiny_crossed")
    rows = whole(data)
    assert rows.groupby(["first", "second"]).size().shape == (4,)
    pair, second = data.pairs[0], data.second
    for asked in (40, 10**6):
        count = data.fits(pair, "train", asked)
        assert count == (10 if asked == 40 else count) > 0
        about = {"text_column_name": "text", "column1_name": "first", "column2_name": "second",
                 "column1_mapping": dict(zip(pair, pair)), "column2_mapping": dict(zip(second, second))}
        before = dataset_info.dataset_metadata
        dataset_info.dataset_metadata = before | {"x": about}
        try:
            groups = dataset_creation.get_spurious_corr_data(rows[rows.part == "train"], pair, second, "x", count, 0)
        finally:
            dataset_info.dataset_metadata = before
        assert {len(texts) for texts in groups.values()} == {2 * count}
    assert labelled.source_by_sentiment().fits(("movies", "editorials"), "test", 4000) < 10


def test_a_misspelt_name_is_answered():
    with pytest.raises(ParameterError, match="'topic' is not known; did you mean 'topics'"):
        labelled.labelled("topic")
    with pytest.raises(ParameterError, match="known are source_by_sentiment"):
        labelled.crossed("topics")
