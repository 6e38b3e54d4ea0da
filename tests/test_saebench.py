"""SAEBench core through our wrapper: what it must say of SAEs whose figures are known beforehand."""

import itertools
import math
import os
import random
import subprocess
import sys
import warnings

import pytest
import torch
from test_hooked_model import write_model

from sae_lib import metrics, runs
from sae_lib.data import language_model
from sae_lib.data import tiny_model as planted
from sae_lib.evaluation import saebench
from sae_lib.params import ParameterError
from sae_lib.runs import RunError
from sae_lib.sae import architectures
from sae_lib.sae.autoencoder import SparseAutoencoder

D, CONTEXT = planted.D_MODEL, 32


IMPORT = """
from sae_lib.evaluation.saebench import adapter
adapter.import_sae_bench()
from sae_bench.evals.core import main
from sae_bench.sae_bench_utils import sae_selection_utils as selection
from sae_lens.loading import pretrained_saes_directory as directory
assert directory.get_pretrained_saes_directory.cache_info().misses == 0
assert selection.get_saes_from_regex("gemma-scope-2b-pt-res", "layer_12/width_16k/.*")
"""


class Identity(SparseAutoencoder):
    """x = relu(x) - relu(-x): exact, with unit rows; optionally blind where the activation is the sink's."""

    def __init__(self, sink=None, d_in=D):
        rows = torch.cat([torch.eye(d_in), -torch.eye(d_in)])
        super().__init__(rows.clone(), torch.zeros(2 * d_in), rows, torch.zeros(d_in), architectures.get("standard")())
        self.sink, self.blinded = sink, 0

    def encode(self, x):
        latents = super().encode(x)
        if self.sink is not None:
            blind = (x - self.sink).norm(dim=1) < 1e-2 * self.sink.norm()
            self.blinded += int(blind.sum())
            latents = latents * ~blind[:, None]
        return latents


def constant(value):
    """Reconstructs every activation as ``value`` (D,)."""
    rows = torch.nn.functional.normalize(torch.randn(8, D, generator=torch.Generator().manual_seed(0)), dim=1)
    return SparseAutoencoder(torch.zeros(8, D), torch.zeros(8), rows, value, architectures.get("standard")())


@pytest.fixture(scope="module")
def texts():
    return list(itertools.islice(planted.documents(5), 40))


@pytest.fixture
def core(tiny_model, texts):
    def run(sae, **changes):
        return saebench.core(sae, tiny_model, **{"texts": texts, "preset": "smoke", "context": CONTEXT} | changes)
    return run


@pytest.mark.parametrize("kind", ["tiny", "llama", "gemma2"])
def test_identity_but_at_position_0_recovers_all(tiny_model, texts, tmp_path, monkeypatch, kind):
    lm = tiny_model if kind == "tiny" else language_model.load(
        write_model(tmp_path, kind), hook="blocks.1.hook_resid_post", dtype="float32", device="cpu", whole=True)
    if kind != "tiny":
        draw = random.Random(0)
        texts = [" ".join(f"w{draw.randrange(60)}" for _ in range(90)) for _ in range(9)]
    # The stream of BOS at position 0, which no later token changes.
    sink = lm.residual(torch.tensor([[lm.bos_id, 9]]))[0, 0].float()
    sae = Identity(sink, lm.d_model)
    report = saebench.core(sae, lm, texts, "smoke", context=CONTEXT)
    assert sae.blinded >= 8  # the BOS of each block went through it
    assert report["metrics"]["ce_loss_score"] == pytest.approx(1, abs=1e-3)
    assert report["metrics"]["kl_div_with_sae"] == pytest.approx(0, abs=1e-5)
    assert report["metrics"]["explained_variance"] == pytest.approx(1, abs=1e-6)

    from sae_bench.evals.core import main

    from sae_lib.evaluation.saebench import checking
    monkeypatch.setattr(checking, "configuration", lambda *_: None)  # which would refuse what follows
    real = main.multiple_evals
    monkeypatch.setattr(main, "multiple_evals", lambda *a, **options: real(
        *a, **options | {"exclude_special_tokens_from_reconstruction": False}))
    spoiled = saebench.core(Identity(sink, lm.d_model), lm, texts, "smoke", context=CONTEXT)
    assert spoiled["metrics"]["kl_div_with_sae"] > 1e-4  # it is the mask that does it


def test_zero_recovers_nothing(core):
    values = core(constant(torch.zeros(D)))["metrics"]
    assert values["ce_loss_score"] < 0.2  # not 0: BOS stays as it is
    assert values["l0"] == 0 and values["frac_alive"] == 0
    assert values["explained_variance"] <= 0


def test_predicting_the_mean_explains_nothing(core, tiny_model, texts):
    blocks = saebench._blocks(tiny_model, texts, saebench.PRESETS["smoke"], CONTEXT)
    x = tiny_model.residual(blocks).float()
    special = torch.tensor([0, 1, 2])  # pad, eos, bos
    mean = x[~torch.isin(blocks, special)].mean(0)
    report = core(constant(mean))
    assert report["metrics"]["explained_variance"] == pytest.approx(0, abs=1e-6)
    assert report["config"]["explained_variance_tokens"] == int((~torch.isin(blocks, special)).sum())
    faulty = report["raw"]["eval_result_metrics"]["reconstruction_quality"]["explained_variance"]
    assert faulty > 0.01  # why it is not among the metrics


def test_the_report_names_everything(core, tiny_model, tmp_path):
    report = core(Identity(), output_folder=tmp_path / "evals")
    config = report["config"]
    assert (config["model_identity"], config["hook"], config["d_sae"]) == (tiny_model.identity, tiny_model.hook, 2 * D)
    assert config["tokens"] == 8 * CONTEXT > config["tokens_evaluated"] > 7 * CONTEXT
    assert config["note"] is None
    assert report["provenance"]["packages"]["sae-bench"] == "0.6.0"
    written = runs.read_json(tmp_path / "evals" / "core.json")
    assert written["metrics"].keys() == report["metrics"].keys()
    assert not {"mse"} & report["metrics"].keys()
    for name in ("ce_loss_score", "kl_div_score", "kl_div_with_sae", "cossim", "l2_ratio", "frac_alive", "l0"):
        assert isinstance(report["metrics"][name], float) and name in metrics.METRICS
    assert "sae_bench_commit_hash" not in report["raw"]


def test_the_model_alone_is_computed_once_for_all_saes(core):
    first, again, other = core(Identity(), context=16), core(Identity(), context=16), core(constant(torch.zeros(D)),
                                                                                         context=16)
    assert (first["model_reused"], again["model_reused"], other["model_reused"]) == (False, True, True)
    assert first["metrics"] == again["metrics"]
    assert first["config"] == again["config"]
    assert first["config"]["comparable"] == other["config"]["comparable"]
    assert other["metrics"]["ce_loss_without_sae"] == first["metrics"]["ce_loss_without_sae"]


@pytest.mark.parametrize("kind", ["tiny", "llama"])
def test_fewer_passes_over_the_vocabulary_give_saebench_s_own_figures(tiny_model, texts, tmp_path, monkeypatch, kind):
    from sae_lib.evaluation.saebench import reconstruction

    lm = tiny_model if kind == "tiny" else language_model.load(
        str(write_model(tmp_path, kind)), hook="blocks.1.hook_resid_post", dtype="float32", device="cpu", whole=True)
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(96, lm.d_model, generator=generator), dim=1)
    sae = SparseAutoencoder(rows.clone(), torch.full((96,), -0.1), rows, torch.zeros(lm.d_model),
                            architectures.get("standard")())
    monkeypatch.setattr(reconstruction, "CHUNK", 700)  # some rows at a time
    own_sums, calls = reconstruction._over_vocabulary, []
    monkeypatch.setattr(reconstruction, "_over_vocabulary", lambda *a, **k: calls.append(1) or own_sums(*a, **k))
    found = saebench.core(sae, lm, texts=texts, preset="smoke", context=CONTEXT)
    again = saebench.core(sae, lm, texts=texts, preset="smoke", context=CONTEXT)
    monkeypatch.setattr(reconstruction, "applies", lambda *_: False)
    own = saebench.core(sae, lm, texts=texts, preset="smoke", context=CONTEXT)
    applied = kind == "llama" or not lm.hf.config.to_dict().get("final_logit_softcapping")
    assert again["metrics"] == found["metrics"] and again["model_reused"]
    for name, value in own["metrics"].items():
        assert found["metrics"][name] == pytest.approx(value, rel=2e-5, abs=1e-6), name
    assert found["metrics"]["kl_div_with_sae"] > 0.01
    assert len(calls) == (4 if applied else 0), "the model alone and ablated, and the SAE twice"


def test_every_block_begins_with_bos_and_none_comes_twice(tiny_model, texts):
    blocks = saebench._blocks(tiny_model, texts, saebench.Batches(100, 100, 4), CONTEXT)
    assert (blocks[:, 0] == tiny_model.bos_id).all()
    assert len(torch.unique(blocks, dim=0)) == len(blocks)
    assert torch.equal(blocks, saebench._blocks(tiny_model, texts, saebench.Batches(100, 100, 4), CONTEXT))
    assert not torch.isin(blocks, tiny_model.bos_id).all(0)[1:].any()


def test_text_that_runs_out_is_said_not_repeated(core, texts):
    report = core(Identity(), texts=texts[:4], preset="paper")
    config = report["config"]
    assert "expected 35200 for 'paper'" in config["note"]
    assert config["blocks"] == (config["reconstruction"] + config["sparsity"]) * config["rows"] < 35_200
    ours = report["raw"]["eval_config"]
    assert ours["n_eval_reconstruction_batches"] == config["reconstruction"]
    with pytest.raises(ParameterError, match="at least 2 are needed"):
        core(Identity(), texts=["the"])
    with pytest.raises(ParameterError, match="at least 2 are needed"):
        core(Identity(), texts=[])


@pytest.mark.parametrize("available, expected", [(160, (4, 16, 8)), (1000, (4, 16, 8)), (159, (4, 15, 8)),
                                                 (95, (3, 8, 8)), (24, (1, 2, 8)), (15, (1, 1, 7)), (2, (1, 1, 1))])
def test_batches_fit_the_text(available, expected):
    batches = saebench.fit(saebench.PRESETS["default"], available, 128)
    assert batches == expected and batches.blocks <= available


def test_what_cannot_be_evaluated_is_refused(core, tiny_model, texts):
    sae = Identity()
    sae.W_dec.data[3] *= 1.01
    with pytest.raises(ParameterError, match="1 of 128 decoder rows are not of unit norm"):
        core(sae)
    sae.W_dec.data[3] = float("nan")
    with pytest.raises(ParameterError, match="1 of 128 decoder rows"):
        core(sae)
    with pytest.raises(ParameterError, match="eval_preset: 'big'.*smoke, default, paper"):
        core(Identity(), preset="big")
    with pytest.raises(ParameterError, match="context: 99999"):
        core(Identity(), context=99_999)
    with pytest.raises(ParameterError, match="whole=True"):
        saebench.core(Identity(), tiny_model._replace(whole=False), texts, "smoke", context=CONTEXT)
    narrow = SparseAutoencoder(torch.eye(4), torch.zeros(4), torch.eye(4), torch.zeros(4),
                               architectures.get("standard")())
    with pytest.raises(ParameterError, match="width 4, tiny has 64"):
        core(narrow)


def test_a_swallowed_error_is_raised_and_everything_is_put_back(core, tmp_path, monkeypatch):
    from sae_bench.evals.core import main

    class Broken(Identity):
        def encode(self, x):
            torch.set_grad_enabled(False)
            raise ValueError("the encoder is broken")

    monkeypatch.chdir(tmp_path)
    before = main.HookedTransformer, main.ActivationsStore, list(main.logger.handlers), torch.get_num_threads()
    with pytest.raises(RunError, match="gave no result.*the encoder is broken"):
        core(Broken(), threads=2)
    assert torch.is_grad_enabled()
    core(Identity(), threads=2)
    after = main.HookedTransformer, main.ActivationsStore, list(main.logger.handlers), torch.get_num_threads()
    assert before == after
    assert torch.is_grad_enabled() and not os.listdir(tmp_path)
    assert main.HookedTransformer.__name__ == "HookedTransformer"


def test_the_sae_itself_is_left_as_it_was(core):
    sae = Identity()
    weights = [w.clone() for w in sae.parameters()]
    with warnings.catch_warnings():
        core(sae)
    assert all(torch.equal(a, b) for a, b in zip(weights, sae.parameters()))


@pytest.mark.parametrize("name", sorted(architectures.REGISTRY))
def test_core_measures_every_architecture(core, name):
    """With figures that are those of the SAE's own encoder: L0 and recovered cross-entropy are there and finite."""
    made = architectures.get(name)(k=4, threshold_start=0.3)
    sae = SparseAutoencoder.initialise(96, torch.zeros(D), made, torch.Generator().manual_seed(0))
    report = core(sae.requires_grad_(False))
    assert report["metrics"]["l0"] > 0 and math.isfinite(report["metrics"]["ce_loss_score"])
    assert report["config"]["d_sae"] == 96


@pytest.mark.parametrize("cut", [False, True])
def test_intervals_hold_saebench_s_own_values(core, monkeypatch, cut):
    """Taken apart by block, the means are SAEBench's own: then an interval is drawn about what it measured."""
    module, held = sys.modules["sae_lib.evaluation.saebench.core"], []
    made = module.Blocks
    monkeypatch.setattr(module, "Blocks", lambda: held.append(made()) or held[0])
    if cut:  # explained variance reads the first rows alone, cut within a block
        monkeypatch.setattr(module, "VARIANCE_ROWS", 75)
    report = core(some_sae())
    whole, within = held[0].figures(), report["within_this_sae"]
    assert {"ce_loss_score", "kl_div_score", "l0", "cossim", "l2_ratio", "explained_variance"} <= set(whole)
    for name, value in whole.items():
        assert value == pytest.approx(report["metrics"][name], rel=1e-5), name
        low, high = within[name]
        assert low < report["metrics"][name] < high, name
    assert (within["level"], within["by"]) == (0.95, "bootstrap over blocks of text")


def some_sae():
    made = architectures.get("standard")()
    sae = SparseAutoencoder.initialise(96, torch.zeros(D), made, torch.Generator().manual_seed(0))
    return sae.requires_grad_(False)


def test_the_list_of_hub_saes_is_parsed_when_it_is_asked_for():
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", IMPORT]).returncode == 0
