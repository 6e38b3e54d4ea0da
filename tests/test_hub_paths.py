"""SAEBench's own data code and the studies' settings, on a local Gemma-2 and data sets with the hub's columns."""

import random

import pandas as pd
import pytest
import torch
from test_probing import made

from sae_lib import params
from sae_lib.data import labelled, tiny_model
from sae_lib.evaluation import saebench
from sae_lib.evaluation.reported import settings
from sae_lib.evaluation.saebench import scr_tpp, sparse_probing
from sae_lib.params import ParameterError

CLASSES, GENDERS = "abcdefghijklopr", "mn"
ROWS = {"train": 36, "test": 20}
CUT = {"sparse_probing": {"probe_train_set_size": 64, "probe_test_set_size": 32, "context_length": 24},
       "scr": {"train_set_size": 64, "test_set_size": 32, "context_length": 24, "n_values": [2, 20]},
       "core": {"n_eval_reconstruction_batches": 1, "n_eval_sparsity_variance_batches": 1, "batch_size_prompts": 4,
                "context_size": 16}}


def text(*key, letters):
    return labelled._tiny_text(random.Random(" ".join(map(str, key))), letters)


def crossed(part, column, of, other, values):
    """Rows of two labels: a class (an integer) and one of two values."""
    return pd.DataFrame([{"hard_text": made_up, "text": made_up, column: number, other: value}
                         for place, number in enumerate(of) for second, value in enumerate(values)
                         for row in range(ROWS[part])
                         for made_up in [text(part, column, number, value, row,
                                              letters=CLASSES[place] + GENDERS[second])]])


def of_the_hub(name, pair=None, split=None, languages=(), **_options):
    """``load_dataset`` as SAEBench calls it: the columns of the hub's data sets, tiny texts."""
    if name == "LabHC/bias_in_bios":
        of = (0, 1, 2, 6, 9, 11, 13, 14, 18, 19, 20, 21, 22, 25, 26)
        return {part: crossed(part, "profession", of, "gender", (0, 1)) for part in ROWS}
    if name == "canrager/amazon_reviews_mcauley_1and5":
        of = (1, 2, 3, 5, 6, 11, 18, 24, 26, 30)
        return {part: crossed(part, "category", of, "rating", (1.0, 5.0)) for part in ROWS}
    if name == "fancyzhx/ag_news":
        return {part: pd.DataFrame([{"text": text(part, label, row, letters=CLASSES[label]), "label": label}
                                    for label in range(4) for row in range(ROWS[part])]) for part in ROWS}
    if name == "Helsinki-NLP/europarl":
        own = {"en-fr": "en", "fr-it": "fr", "de-en": "de", "es-fr": "es", "nl-pt": "nl"}[pair]
        place = ["en", "fr", "de", "es", "nl"].index(own)
        return [{"translation": {own: text(own, row, letters=CLASSES[place])}} for row in range(60)]
    assert name == "codeparrot/github-code" and split == "train"
    return [{"language": language, "code": " ".join(text(language, row, part, letters=CLASSES[place])
                                                    for part in range(8))}
            for row in range(60) for place, language in enumerate(languages)]


@pytest.fixture(scope="module")
def gemma(tiny_named):
    return tiny_named("gemma-2-2b")


@pytest.fixture(scope="module")
def planted(gemma):
    """A latent for each letter that a class has."""
    words = tiny_model.words()
    ids = [gemma.tokenizer(" " + word, add_special_tokens=False)["input_ids"][-1] for word in words]
    x = gemma.residual(torch.tensor([[gemma.bos_id, number] for number in ids]))[:, 1].float()
    rows = torch.stack([x[[word[0] == letter for word in words]].mean(0) for letter in CLASSES + GENDERS])
    return made(rows - x.mean(0), 0.4)


@pytest.fixture
def hub(monkeypatch):
    """SAEBench's ``load_dataset`` gives the tiny data sets; reported numbers are cut down."""
    from sae_bench.evals.scr_and_tpp import dataset_creation
    from sae_bench.sae_bench_utils import dataset_utils

    real = settings.of
    monkeypatch.setattr(dataset_utils, "load_dataset", of_the_hub)
    monkeypatch.setattr(dataset_creation, "load_dataset", of_the_hub)
    monkeypatch.setattr(settings, "of", lambda preset, name: real(preset, name) | CUT.get(name, {}))


def test_settings_are_those_of_the_records():
    one, two = (settings.of(preset, "unlearning") for preset in settings.PRESETS)
    assert (one["retain_thresholds"], one["n_features_list"]) == ([0.001, 0.01], [10, 20])
    assert (two["retain_thresholds"], two["n_features_list"]) == ([0.001, 0.005, 0.01, 0.02], [10, 100, 1000])
    assert one["multipliers"] == [25, 50, 100, 200] and two["multipliers"] == [10, 25, 50, 100, 200]
    for preset in settings.PRESETS:
        assert settings.of(preset, "sparse_probing")["k_values"] == [1, 2, 5, 10, 20, 50]
        assert settings.of(preset, "core")["n_eval_sparsity_variance_batches"] == 2000
        assert settings.dtype(preset) == "bfloat16"
    assert settings.of("reported_001", "scr")["n_values"] == [2, 5, 10, 20, 50, 100, 500]
    with pytest.raises(ParameterError, match="'reported_000': .*orthogonality hold no configuration of scr"):
        settings.of("reported_000", "scr")
    with pytest.raises(ParameterError, match="no configuration of tpp; they hold one of absorption, core, scr"):
        settings.of("reported_001", "tpp")
    assert settings.dtype("paper") == "float32"
    assert params.check("eval", {"eval_preset": "reported_001"}).eval_preset == "reported_001"


def test_reported_settings_want_their_model(tiny_model, gemma, planted):
    for name in ("tiny", "smollm2", "google/gemma-2-9b"):
        with pytest.raises(ParameterError, match=f"what was run on google/gemma-2-2b; model '{name}'"):
            sparse_probing.sparse_probing(planted, tiny_model._replace(name=name), "reported_000")
    with pytest.raises(ParameterError, match="hold no configuration of tpp"):
        scr_tpp.tpp(planted, gemma, "reported_001")


def test_sparse_probing_reads_the_hubs_data_with_reported_settings(gemma, planted, hub):
    report = sparse_probing.sparse_probing(planted, gemma, "reported_000")
    found, config = report["metrics"], report["config"]
    assert set(config["data"]) == set(settings.of("reported_000", "sparse_probing")["dataset_names"])
    assert found["sae_top_1_test_accuracy"] > 0.85 and found["sae_top_5_test_accuracy"] > 0.85
    assert {f"sae_top_{k}_test_accuracy" for k in (1, 2, 5, 10)} < set(found)
    assert set(config["not_as_reported"]) == {"model_name", "llm_dtype"}
    assert config["not_as_reported"]["llm_dtype"] == {"reported": "bfloat16", "here": "float32"}
    classes = report["raw"]["eval_result_unstructured"]["codeparrot/github-code_results"]["sae_top_1_test_accuracy"]
    assert set(classes) == {"C", "Python", "HTML", "Java", "PHP"} and min(classes.values()) > 0.7
    rows = torch.randn(24, planted.d_in, generator=torch.Generator().manual_seed(0))
    q = torch.linalg.qr(planted.W_dec.detach().T).Q
    blind = sparse_probing.sparse_probing(made(rows - rows @ q @ q.T), gemma, "reported_000")
    assert blind["model_reused"] and blind["metrics"]["sae_top_1_test_accuracy"] < 0.7


def test_scr_and_tpp_read_the_hubs_data(gemma, planted, hub, monkeypatch):
    removed = scr_tpp.scr(planted, gemma, "reported_001")
    assert removed["metrics"]["scr_metric_threshold_2"] > 0.1 and removed["config"]["ablated"] == [2]
    assert len(removed["config"]["texts"]) == 8  # four pairs of professions, four of categories
    assert "LabHC/bias_in_bios_class_set1 professor nurse" in removed["config"]["texts"]
    monkeypatch.setitem(scr_tpp.PRESETS, "paper", scr_tpp.Preset(64, 32, 24, (2, 20)))
    targeted = scr_tpp.tpp(planted, gemma._replace(name="google/gemma-2-2b"), "paper")
    assert targeted["metrics"]["tpp_threshold_2_total_metric"] > 0.1
    assert targeted["config"]["data"]["LabHC/bias_in_bios_class_set1"] == "SAEBench's own, of the hub"


def test_core_takes_its_batches_from_the_record(gemma, planted, hub):
    texts = [text("core", number, letters="ab") for number in range(40)]
    report = saebench.core(planted, gemma, texts, "reported_001", context=99)
    config = report["config"]
    assert (config["reconstruction"], config["rows"], config["context"]) == (1, 4, 16)
    assert config["not_as_reported"]["dataset"] == {"reported": "Skylion007/openwebtext", "here": "held-out text"}
    assert "n_eval_reconstruction_batches" not in config["not_as_reported"]
