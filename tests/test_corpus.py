import json

import numpy as np
import pytest

from sae_lib import params
from sae_lib.data import corpus, sources, words
from sae_lib.data import tiny_model as making
from sae_lib.params import ParameterError


def texts(count, seed=0):
    return [text for text, _ in zip(making.documents(seed), range(count))]


def write(folder, kind, rows, column="text"):
    """Documents in each of the forms that are read; the column is that of openwebtext."""
    if kind == "txt":
        path = folder / "text.txt"
        path.write_text("\n\n".join(rows))
    elif kind == "jsonl":
        path = folder / "text.jsonl"
        path.write_text("\n".join(json.dumps({column: row, "url": "u"}) for row in rows))
    elif kind == "folder":
        path = folder / "many"
        path.mkdir()
        for i, row in enumerate(rows):
            (path / f"{i:04d}.txt").write_text(row)
    else:
        import datasets

        data = datasets.Dataset.from_dict({column: rows})
        path = folder / f"text.{kind}"
        data.to_parquet(path) if kind == "parquet" else data.save_to_disk(path)
    return str(path)


def build(p, model):
    return corpus.build(p, model.tokenizer, model.bos_id)


def test_blocks_begin_with_bos_and_hold_the_documents(tiny, tiny_model):
    made = build(tiny(spelling_share=0.0), tiny_model)
    tokens, document = made.train.tokens, made.train.document
    assert tokens.shape == (194, 32) and (tokens[:, 0] == 2).all() and (document[:, 0] == -1).all()
    assert not (tokens[:, 1:] == 2).any() and (tokens[:, 1:] == 1).any()  # EOS ends documents
    flat, owner = tokens[:, 1:].ravel(), document[:, 1:].ravel()
    assert (np.diff(owner) >= 0).all() and (flat[:-1][np.diff(owner) > 0] == 1).all()
    first = tiny_model.tokenizer.decode(flat[owner == 0][:-1]).strip()
    assert first == next(text for text in texts(50) if not corpus.is_heldout(text))


def test_held_out_documents_are_apart(tiny, tiny_model):
    made = build(tiny(), tiny_model)
    assert all(corpus.is_heldout(text) for text in made.heldout.texts) and made.train.texts == []
    train = [d.text for d in corpus.stream(tiny(), tiny_model.tokenizer, "train", 6000)]
    assert not set(train) & set(made.heldout.texts)
    share = np.mean([corpus.is_heldout(text) for text in texts(4000)])
    assert 0.035 < share < 0.065
    assert made.counts["heldout"]["text_tokens"] >= 2048


def test_weights_and_prompts_have_their_share(tiny, tiny_model, tmp_path):
    other = write(tmp_path, "jsonl", texts(200, seed=5))
    made = build(tiny(corpus={"tiny": 3, other: 1}, spelling_share=0.2), tiny_model)
    for split in ("train", "heldout"):
        counts = made.counts[split]
        shares = {name: tokens / counts["text_tokens"] for name, tokens in counts["tokens"].items()}
        assert shares == pytest.approx({"tiny": 0.6, other: 0.2, "spelling": 0.2}, abs=0.01)


def test_prompts_use_words_that_evaluation_does_not(tiny_model):
    found = words.split(tiny_model.tokenizer)
    assert not set(found.prompts) & set(found.evaluation)
    assert set(found.small_letters) == set("qxz") and not {w[0] for w in found.prompts} & set("qxz")
    assert 0.2 < len(found.prompts) / (len(found.prompts) + len(found.evaluation)) < 0.3
    used = set()
    for prompt, _ in zip(words.prompt_documents(tiny_model.tokenizer), range(200)):
        lines = prompt.split("\n")
        assert len(lines) == 11
        for line in lines:
            word, *rest = line.split()
            assert rest == ["has", "the", "first", "letter:", word[0].upper()]
            used.add(word)
        assert tiny_model.tokenizer.unk_token_id not in tiny_model.tokenizer(prompt)["input_ids"]
    assert used <= set(found.prompts)
    tokens = words.evaluation_tokens(tiny_model.tokenizer, [" " + w for w in found.prompts + found.evaluation])
    assert sorted(tokens) == sorted(" " + w for w in found.evaluation)


def test_prompts_are_written_as_saebench_writes_them(tiny_model):
    from sae_lib.data.language_model import import_transformers

    import_transformers()
    from sae_bench.evals.absorption import prompting

    prompt = next(words.prompt_documents(tiny_model.tokenizer))
    listed = [" " + line.split()[0] for line in prompt.split("\n")]
    theirs = prompting.create_icl_prompt(listed[-1], listed[:-1], base_template=prompting.VERBOSE_FIRST_LETTER_TEMPLATE,
                                         shuffle_examples=False)
    assert theirs.base + theirs.answer == prompt


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "saved", "folder"])
def test_local_text_gives_the_same_documents_in_every_form(kind, tiny, tmp_path):
    rows = texts(60)
    path = write(tmp_path, kind, rows)
    assert sorted(sources.documents(path, tiny())) == sorted(rows)
    assert list(sources.documents(path, tiny())) == list(sources.documents(path, tiny()))
    assert list(sources.documents(path, tiny())) != list(sources.documents(path, tiny(corpus_seed=1)))


def test_a_hub_data_set_is_streamed(tiny, tmp_path, monkeypatch):
    import datasets

    rows, asked = texts(40), {}

    def load_dataset(name, **options):
        asked.update(options, name=name)
        return datasets.Dataset.from_dict({"text": rows}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert sorted(sources.documents("Skylion007/openwebtext", tiny())) == sorted(rows)
    assert asked == {"name": "Skylion007/openwebtext", "split": "train", "streaming": True}


def test_large_sources_are_shuffled_within_a_buffer(monkeypatch):
    import random

    monkeypatch.setattr(sources, "SHUFFLE_BUFFER", 50)
    drawn = list(sources._shuffled(iter(range(500)), random.Random(0)))
    assert sorted(drawn) == list(range(500)) and drawn[:50] != list(range(50)) and max(drawn[:50]) < 100


@pytest.mark.parametrize("make, changes, said", [
    (lambda f: write(f, "jsonl", texts(5), column="body"), {}, "corpus_column: .*no text in a column 'text'.*body"),
    (lambda f: write(f, "parquet", texts(5), column="body"), {}, "corpus_column: .*it has body"),
    (lambda f: write(f, "txt", texts(60)), {"tokens": 100_000}, "tokens: corpus .* use tokens: [1-9]"),
    (lambda f: write(f, "txt", [" "]), {}, "corpus: .* holds no text for training"),
    (lambda f: str(f), {}, "corpus: .* holds no text that can be read"),
    (lambda f: write(f, "txt", [t for t in texts(200) if not corpus.is_heldout(t)]), {"spelling_share": 0.0},
     "corpus: the held-out documents"),
])
def test_text_that_cannot_be_used_is_one_clear_error(make, changes, said, tiny, tiny_model, tmp_path):
    with pytest.raises(ParameterError, match=said) as error:
        build(tiny(**{"corpus": make(tmp_path)} | changes), tiny_model)
    assert len(str(error.value)) < 500


def test_damaged_and_unknown_sources_are_one_clear_error(tiny, tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    for name, said in (("a.jsonl", "line 2: not JSON"), ("a.parquet", "not a whole parquet file")):
        with pytest.raises(ParameterError, match=said):
            list(sources.documents(str(tmp_path / name), tiny()))

    def offline(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(ParameterError, match="corpus: 'nobody/nothing' is no alias .*no route"):
        list(sources.documents("nobody/nothing", tiny()))


def test_the_tokens_that_the_error_offers_are_accepted(tiny, tiny_model, tmp_path):
    path = write(tmp_path, "txt", texts(300))
    with pytest.raises(ParameterError) as error:
        build(tiny(corpus=path, tokens=10**6), tiny_model)
    offered = int(str(error.value).split("use tokens: ")[1].split()[0])
    made = build(tiny(corpus=path, tokens=offered), tiny_model)
    assert made.counts["train"]["text_tokens"] == offered


def test_wikipedias_markup_goes():
    wiki = ("'''Anarchism''' is a [[political philosophy|philosophy]]{{cite|{{x}}}}.<ref name=\"a\">no</ref>\n"
            "== History ==\n* [[Greece]], [http://x.org see]\n[[File:a.jpg|thumb|A [[b]] c]]\n{| class\n| cell\n|}end")
    assert sources.plain_text(wiki) == "Anarchism is a philosophy.\nHistory\nGreece, see\n\nend"


def test_a_relative_corpus_is_found_from_the_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert params.local_path("sae_lib/runs.py").is_file() and params.local_path("news") is None
