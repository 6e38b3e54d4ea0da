"""SAEs made elsewhere, and activations computed elsewhere: the same figures as their own library's code gives."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sae_lib import metrics, params, runs
from sae_lib.data import activations
from sae_lib.data.language_model import import_transformers
from sae_lib.data.precomputed import Precomputed
from sae_lib.evaluation import evaluate, foreign_run, letters, results
from sae_lib.params import ParameterError
from sae_lib.runs import RunError
from sae_lib.sae.autoencoder import SparseAutoencoder
from sae_lib.sae.foreign import load_foreign
from sae_lib.training import trainer
from sae_lib.training.ingredients import load_sae

D, F, K = 64, 96, 8


# -- the other libraries' forward passes, word for word in what they compute -------------------------------------

class AutoEncoderTopK(nn.Module):
    """dictionary_learning 0.1.0, trainers/top_k.py."""

    def __init__(self, unit=True):
        super().__init__()
        self.register_buffer("k", torch.tensor(K, dtype=torch.int))
        self.register_buffer("threshold", torch.tensor(-1.0))
        self.decoder = nn.Linear(F, D, bias=False)
        self.decoder.weight.data /= self.decoder.weight.data.norm(dim=0) if unit else 0.1
        self.encoder = nn.Linear(D, F)
        self.encoder.weight.data = self.decoder.weight.data.T.clone()
        self.b_dec = nn.Parameter(torch.zeros(D))

    def forward(self, x):
        top = self.encoder(x - self.b_dec).relu().topk(self.k, sorted=False, dim=-1)
        return self.decoder(torch.zeros(len(x), F).scatter_(-1, top.indices, top.values)) + self.b_dec


class AutoEncoder(nn.Module):
    """dictionary_learning 0.1.0, dictionary.py."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(D))
        self.encoder, self.decoder = nn.Linear(D, F), nn.Linear(F, D, bias=False)

    def forward(self, x):
        return self.decoder(self.encoder(x - self.bias).relu()) + self.bias


class AutoEncoderNew(nn.Module):
    """dictionary_learning 0.1.0, dictionary.py."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(D, F), nn.Linear(F, D)

    def forward(self, x):
        return self.decoder(self.encoder(x).relu())


class SparseCoder(nn.Module):
    """sparsify 1.3.3, sparse_coder.py."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(D, F)
        self.W_dec, self.b_dec = nn.Parameter(self.encoder.weight.data.clone()), nn.Parameter(torch.zeros(D))

    def forward(self, x):
        top = self.encoder(x - self.b_dec).relu().topk(K, dim=-1, sorted=False)
        return torch.einsum("bk,bkd->bd", top.values, self.W_dec[top.indices]) + self.b_dec


def fit(model, store, steps=120):
    """Train a module on a store's rows, as anybody would elsewhere."""
    bias = next(p for name, p in model.named_parameters() if name in ("bias", "b_dec", "decoder.bias"))
    bias.data = store.mean.clone()
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for batch in store.batches(256, 256 * steps, seed=1):
        loss = (model(batch.x) - batch.x).square().sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.requires_grad_(False).eval()


def dictionary_learning(kind, folder, store, **changes):
    model = fit(kind(), store)
    torch.save(model.state_dict(), folder / "ae.pt")
    said = {"dict_class": kind.__name__, "lm_name": "tiny", "layer": 1, "activation_dim": D, "dict_size": F, "k": K}
    (folder / "config.json").write_text(json.dumps({"trainer": said | changes, "buffer": {}}))
    return model


def sparsify(folder, store):
    model = fit(SparseCoder(), store)
    save_file(model.state_dict(), folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"activation": "topk", "expansion_factor": 32, "k": K, "d_in": D,
                                                 "normalize_decoder": False, "num_latents": F, "multi_topk": False,
                                                 "skip_connection": False, "transcode": False}))
    return model


def saelens(folder, store, kind="topk", **settings):
    """Trained with SAELens' own training class and saved by it for inference."""
    import_transformers()
    import sae_lens

    name = {"topk": "TopKTrainingSAE", "standard": "StandardTrainingSAE", "jumprelu": "JumpReLUTrainingSAE",
            "gated": "GatedTrainingSAE"}[kind]
    extra = {"topk": {"k": K}, "jumprelu": {}}.get(kind, {"l1_coefficient": 0.0})
    config = getattr(sae_lens, f"{name}Config")(d_in=D, d_sae=F, **extra | settings)
    model = getattr(sae_lens, name)(config)
    fit(model, store)
    for name in ("r_mag", "b_mag", "log_threshold"):  # as training leaves them: no two latents alike
        if hasattr(model, name):
            getattr(model, name).data += 0.3 * torch.randn(F)
    model.cfg.metadata.model_name, model.cfg.metadata.hook_name = "tiny", "blocks.1.hook_resid_post"
    model.save_inference_model(folder)
    return sae_lens.SAE.load_from_disk(folder)


MAKERS = {
    "saelens topk": saelens,
    "saelens topk, selected as they are": lambda f, s: saelens(f, s, rescale_acts_by_decoder_norm=False),
    "saelens standard": lambda f, s: saelens(f, s, "standard"),
    "saelens jumprelu": lambda f, s: saelens(f, s, "jumprelu"),
    "saelens gated": lambda f, s: saelens(f, s, "gated"),
    "saelens gated, input not centred": lambda f, s: saelens(f, s, "gated", apply_b_dec_to_input=False),
    "saelens, input not centred": lambda f, s: saelens(f, s, "standard", apply_b_dec_to_input=False),
    "dictionary_learning topk": lambda f, s: dictionary_learning(AutoEncoderTopK, f, s),
    "dictionary_learning standard": lambda f, s: dictionary_learning(AutoEncoder, f, s),
    "dictionary_learning new": lambda f, s: dictionary_learning(AutoEncoderNew, f, s),
    "sparsify": sparsify,
}


@pytest.fixture(scope="module")
def made(tiny_store, tmp_path_factory):
    """Every kind of folder, each with its own library's module."""
    torch.manual_seed(0)
    places = {name: tmp_path_factory.mktemp("sae") for name in MAKERS}
    return {name: (folder, MAKERS[name](folder, tiny_store)) for name, folder in places.items()}


@pytest.mark.parametrize("name", MAKERS)
def test_reconstructions_are_the_librarys_own(name, made, tiny_store, tmp_path):
    folder, theirs = made[name]
    x = tiny_store.heldout().x
    ours = load_foreign(folder)
    with torch.no_grad():
        expected = theirs(x)
    assert (ours(x) - expected).norm() / expected.norm() < 1e-5
    assert ours.W_dec.norm(dim=1).sub(1).abs().max() < 1e-4
    ours.save(tmp_path / "sae")
    saved = load_sae(tmp_path / "sae")
    assert torch.equal(saved(x), ours(x)) and torch.equal(saved.encode(x), ours.encode(x))
    assert (saved.decode(saved.encode(x)) - expected).norm() / expected.norm() < 1e-5


def test_norms_that_would_change_the_selection_are_kept_apart(made, tiny_store):
    """Folded by force, this SAE would be another; SAELens refuses to read ours as a plain topk."""
    sae = load_foreign(made["sparsify"][0])
    (hook,) = sae.hooks
    x = tiny_store.heldout().x
    folded = SparseAutoencoder(sae.W_enc * hook.norms[:, None], sae.b_enc * hook.norms, sae.W_dec, sae.b_dec,
                               sae.architecture)
    assert (folded(x) - sae(x)).norm() / sae(x).norm() > 1e-3
    assert not load_foreign(made["saelens topk"][0]).hooks


def test_a_row_of_norm_0_is_a_latent_that_is_never_active(made, tiny_store, tmp_path):
    shutil.copytree(made["dictionary_learning standard"][0], tmp_path / "sae")
    state = torch.load(tmp_path / "sae/ae.pt", weights_only=True)
    state["decoder.weight"][:, 3] = 0
    torch.save(state, tmp_path / "sae/ae.pt")
    theirs = AutoEncoder()
    theirs.load_state_dict(state)
    x, ours = tiny_store.heldout().x, load_foreign(tmp_path / "sae")
    assert torch.allclose(ours(x), theirs(x), atol=1e-4) and (ours.encode(x)[:, 3] == 0).all()
    assert ours.W_dec.norm(dim=1).sub(1).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["saelens topk", "dictionary_learning topk", "sparsify"])
def test_03_evaluates_it_to_its_librarys_explained_variance_and_05_shows_it(name, made, tiny_store):
    folder, theirs = made[name]
    run = f"outside/{name.replace(' ', '-')}"
    given = {"run": run, "sae": str(folder), "eval_preset": "smoke", "device": "cpu", "mode": "batch", "threads": 1,
             "activations": tiny_store.name, "model": "tiny", "layer": 1}
    core = evaluate.evaluate(params.check("eval", given))["core"]
    x = tiny_store.heldout().x
    report = runs.Run(run).json("training.json")
    with torch.no_grad():
        own = metrics.explained_variance(x, theirs(x))
    assert report["explained_variance"] == pytest.approx(own, abs=1e-3) and own > 0.3
    assert core["metrics"]["explained_variance"] > 0.2
    verdict = runs.Run(run).json("validity.json")
    assert verdict["status"] == "valid", verdict
    assert verdict["flags"][0].startswith("made elsewhere (") and "the rules about them" in verdict["flags"][0]
    row = results.collect([run]).iloc[0]
    assert row.status == "valid" and row.explained_variance == pytest.approx(own, abs=1e-3)
    written = (runs.Run(run).path / "training.json").stat().st_mtime_ns
    foreign_run.bring_in(params.check("eval", given))
    assert (runs.Run(run).path / "training.json").stat().st_mtime_ns == written, "measured again for nothing"


@pytest.mark.parametrize("name", ["saelens topk", "dictionary_learning topk"])
def test_04_evaluates_it_as_its_librarys_own_encoder(name, made, tiny_store, monkeypatch):
    """Given to 04 alone, without 03 before it; the letters are those of the other library's latents."""
    folder, theirs = made[name]
    given = params.check("letters", {
        "run": f"outside/letters-{name.replace(' ', '-')}", "sae": str(folder), "activations": tiny_store.name,
        "model": "tiny", "layer": 1, "absorption_preset": "smoke", "absorption_seeds": [7], "device": "cpu",
        "mode": "batch", "threads": 1})
    found = letters.evaluate(given)
    assert found.verdict.status == "valid" and found.verdict.flags[0].startswith("made elsewhere (")
    assert found.letters.kept.sum() >= 20 and 0 < found.report["metrics"]["mean_full_absorption_score"] < 1
    row = results.collect([given.run]).iloc[0]
    assert row.mean_full_absorption_score == found.report["metrics"]["mean_full_absorption_score"]

    def encode(sae, x):
        """Latents of the other library, where decoder rows have the norm that the workbook folds away."""
        with torch.no_grad():
            if hasattr(theirs, "encode"):
                return theirs.encode(x) * theirs.W_dec.norm(dim=1)
            top = theirs.encoder(x - theirs.b_dec).relu().topk(K, sorted=False, dim=-1)
            latents = torch.zeros(len(x), F).scatter_(-1, top.indices, top.values)
            return latents * theirs.decoder.weight.norm(dim=0)
    monkeypatch.setattr(SparseAutoencoder, "encode", encode)
    again = letters.evaluate(given)
    assert again.report["metrics"] == pytest.approx(found.report["metrics"], abs=1e-6)
    assert (again.words.top_latent == found.words.top_latent).all()


def test_what_it_was_trained_on_is_taken_from_the_folder_or_asked_for(made, tiny_store, elsewhere):
    folder = made["dictionary_learning topk"][0]
    given = {"run": "a", "sae": str(folder), "device": "cpu"}
    with pytest.raises(ParameterError, match="no store of blocks.1.hook_resid_post of 'tiny' .*01_extract"):
        foreign_run.bring_in(params.check("eval", given))
    shutil.copytree(tiny_store.path, elsewhere / "activations" / tiny_store.name)
    assert foreign_run.bring_in(params.check("eval", given)).params["hook_name"] == "blocks.1.hook_resid_post"
    with pytest.raises(ParameterError, match="layer: model 'tiny' has 2 layers"):
        foreign_run.bring_in(params.check("eval", given | {"layer": 7}))
    with pytest.raises(ParameterError, match="model: the folder .* does not say it"):
        foreign_run.bring_in(params.check("eval", given | {"sae": str(made["sparsify"][0])}))
    with pytest.raises(ParameterError, match="holds blocks.1.hook_resid_post of 'tiny', not blocks.0"):
        foreign_run.bring_in(params.check("eval", given | {"layer": 0, "activations": tiny_store.name}))
    with pytest.raises(RunError, match="finished with other parameters"):
        foreign_run.bring_in(params.check("eval", given | {"sae": str(made["dictionary_learning standard"][0])}))
    with pytest.raises(ParameterError, match="sae: no folder /no/where; name one that SAELens"):
        foreign_run.bring_in(params.check("eval", given | {"sae": "/no/where"}))
    shutil.copytree(tiny_store.path, elsewhere / "activations/second")
    with pytest.raises(ParameterError, match="2 stores hold .*second; name one|2 stores hold .*second, .*; name one"):
        foreign_run.bring_in(params.check("eval", given))


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


class Code:
    """A pickle that would run code."""

    def __reduce__(self):
        return (pytest.fail, ("code was run",))


REFUSED = [
    ("saelens topk", lambda f: change(f / "cfg.json", architecture="temporal"), "cfg.json: architecture: 'temporal'"),
    ("saelens topk", lambda f: change(f / "cfg.json", architecture="jumprelu"), "lacks threshold"),
    ("saelens topk", lambda f: change(f / "cfg.json", architecture="workbook_topk"), "name its run"),
    ("saelens topk", lambda f: change(f / "cfg.json", normalize_activations="layer_norm"), "normalize_activations"),
    ("saelens topk", lambda f: change(f / "cfg.json", reshape_activations="hook_z"), "reshape_activations"),
    ("saelens topk", lambda f: change(f / "cfg.json", k=F + 1), f"the number of latents, got k = {F + 1}"),
    ("saelens topk", lambda f: (f / "cfg.json").write_text('{"k": '), "cfg.json: damaged JSON"),
    ("saelens topk", lambda f: (f / "cfg.json").write_text("[1]"), "cfg.json: expected a mapping"),
    ("saelens topk", lambda f: torch.save({"x": Code()}, f / "sae_weights.safetensors"), "not a whole safetensors"),
    ("saelens topk", lambda f: (f / "sae_weights.safetensors").unlink(), "no SAE in it"),
    ("saelens topk", lambda f: save_file({"W_enc": torch.ones(2, 2)}, f / "sae_weights.safetensors"),
     "lacks b_enc, W_dec, b_dec"),
    ("dictionary_learning topk", lambda f: torch.save({"x": Code()}, f / "ae.pt"), "ae.pt: cannot be read as tensors"),
    ("dictionary_learning topk", lambda f: torch.save([torch.ones(2)], f / "ae.pt"), "ae.pt: expected a state dict"),
    ("dictionary_learning topk", lambda f: (f / "ae.pt").write_bytes((f / "ae.pt").read_bytes()[:900]),
     "ae.pt: cannot be read as"),
    ("dictionary_learning topk", lambda f: change(f / "config.json", trainer={"dict_class": "GatedAutoEncoder"}),
     "trainer.dict_class: 'GatedAutoEncoder'"),
    ("dictionary_learning topk", lambda f: change(f / "config.json", trainer={"dict_class": "AutoEncoderTopK", "k": 3}),
     f"trainer.k: 3, but ae.pt says k = {K}"),
    ("sparsify", lambda f: change(f / "cfg.json", transcode=True), "cfg.json: transcode"),
    ("sparsify", lambda f: change(f / "cfg.json", activation="groupmax"), "cfg.json: activation: 'groupmax'"),
    ("sparsify", lambda f: change(f / "cfg.json", k="many"), "k = 'many'"),
]


@pytest.mark.parametrize("name, damage, says", REFUSED, ids=[says for _, _, says in REFUSED])
def test_what_is_not_computed_here_or_is_damaged_is_refused(name, damage, says, made, tmp_path):
    folder = shutil.copytree(made[name][0], tmp_path / "sae")
    damage(folder)
    with pytest.raises(RunError) as error:
        load_foreign(folder)
    assert says in str(error.value) and str(folder) in str(error.value)


# -- activations computed elsewhere ------------------------------------------------------------------------------

@pytest.fixture
def outside(tiny_store, tmp_path):
    """The tiny store's training rows in a folder of anybody's making: safetensors, npy, and blocks."""
    x = next(tiny_store.batches(4096, 4096, order="sequence_blocks")).x
    save_file({"x": x[:1024].clone(), "ids": torch.arange(1024)}, tmp_path / "a.safetensors")
    np.save(tmp_path / "b.npy", x[1024:2048].numpy().astype(np.float64))
    np.save(tmp_path / "c.npy", x[2048:].numpy().reshape(-1, 32, D))
    manifest = {"model": "tiny", "hook": "blocks.1.hook_resid_post", "d_in": D, "context": 32, "tensor": "x",
                "files": ["a.safetensors", {"file": "b.npy", "sha256": runs.sha256(tmp_path / "b.npy")}, "c.npy"]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path, x


def test_activations_computed_elsewhere_are_read_as_a_store_is(outside):
    folder, x = outside
    found = Precomputed(folder)
    held = 7 * 32  # a twentieth of 4096 rows, in whole blocks
    assert (found.n_train, found.n_heldout, found.d_in) == (4096 - held, held, D)
    assert torch.equal(found.heldout().x, x[-held:]) and torch.equal(found.heldout(50).x, x[-held:][:50])
    rows = next(found.batches(found.n_train, found.n_train, seed=3))
    order = (rows.block * 32 + rows.position).argsort()
    assert torch.equal(rows.x[order], x[:-held]) and not torch.equal(rows.x, x[:-held])
    assert torch.allclose(found.mean, x[:-held].mean(0), atol=1e-4)
    assert float((x[:-held] * found.scale).square().sum(1).mean()) == pytest.approx(D, rel=1e-4)
    again = list(Precomputed(folder).batches(64, 6400, seed=5, start=40))
    first = list(found.batches(64, 6400, seed=5))
    assert len(first) == 100 and torch.equal(again[0].x, first[40].x) and torch.equal(again[-1].x, first[-1].x)
    blocks = next(found.batches(64, 64, order="sequence_blocks", seed=1))
    assert (blocks.position[:32] == torch.arange(32)).all() and blocks.block[:32].unique().numel() == 1
    assert Precomputed(folder).content_hash == found.content_hash
    small = Precomputed(folder, buffer_mb=1)
    assert sorted(r for b in small.batches(32, 32 * 121, seed=1) for r in b.block.tolist()) == sorted(
        rows.block.tolist())


def test_02_trains_on_them_and_03_asks_for_text(outside, tiny_store):
    folder, _ = outside
    values = {"model": "tiny", "layer": 1, "activations": str(folder), "d_sae": F, "k": K, "samples": 20_000,
              "lr": 2e-3, "batch_size": 256, "warmup_steps": 5, "run": "outside/rows", "threads": 1, "device": "cpu",
              "mode": "batch"}
    p = params.check("train", values)
    trained = trainer.train(p, activations.source(p), runs.start(p))
    assert trained.report["model_identity"].startswith("tiny-gemma2") and trained.report["explained_variance"] > 0.3
    asked = params.check("eval", {"run": "outside/rows", "eval_preset": "smoke", "device": "cpu", "threads": 1})
    assert "names no heldout_texts" in evaluate.evaluate(asked)["core"]["reason"]
    assert runs.Run("outside/rows").json("validity.json")["status"] == "failed"
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in tiny_store.heldout_texts()))
    change(folder / "manifest.json", heldout_texts="texts.jsonl")
    evaluate.evaluate(asked)
    assert runs.Run("outside/rows").json("validity.json")["status"] == "valid"
    with pytest.raises(ParameterError, match="holds blocks.1.hook_resid_post of 'tiny', but the parameters say"):
        activations.source(params.check("train", values | {"layer": 0}))
    with pytest.raises(ParameterError, match="no finished store .*/nowhere; name a folder"):
        activations.source(params.check("train", values | {"activations": "nowhere"}))


def flip(file):
    content = bytearray(file.read_bytes())
    content[-101] ^= 1
    file.write_bytes(content)


def link_out(folder):
    shutil.move(folder / "c.npy", folder.parent / "c.npy")
    (folder / "c.npy").symlink_to(folder.parent / "c.npy")


WRONG = [
    (lambda f: change(f / "manifest.json", d_in=63), "d_in: 63|\\(N, 63\\)"),
    (lambda f: change(f / "manifest.json", files=[]), "manifest.json: files: List should have at least 1"),
    (lambda f: change(f / "manifest.json", contxt=32), "contxt: Extra inputs .*did you mean 'context'"),
    (lambda f: change(f / "manifest.json", hook="layer 3"), "hook_name: 'layer 3'"),
    (lambda f: change(f / "manifest.json", tensor=None), "tensors ids, x; say in manifest.json"),
    (lambda f: change(f / "manifest.json", context=31), "c.npy: expected shape .*\\(n, 31, 64\\)"),
    (lambda f: change(f / "manifest.json", files=["../a.npy"]), "outside the folder"),
    (lambda f: change(f / "manifest.json", files=["gone.npy"]), "gone.npy: not there"),
    (lambda f: change(f / "manifest.json", files=["manifest.json"]), "expected a .safetensors or .npy file"),
    (lambda f: (f / "b.npy").write_bytes((f / "b.npy").read_bytes()[:-500]), "b.npy: cannot be read"),
    (lambda f: flip(f / "b.npy"), "b.npy: its hash is not the manifest's"),
    (lambda f: torch.save({"x": Code()}, f / "a.safetensors"), "a.safetensors: cannot be read as plain numbers"),
    (lambda f: np.save(f / "c.npy", np.array([Code()]), allow_pickle=True), "c.npy: cannot be read as plain numbers"),
    (lambda f: np.save(f / "c.npy", np.zeros((64, D), dtype=np.int64)), "c.npy: expected floating-point .*, got int64"),
    (lambda f: np.save(f / "c.npy", np.full((64, D), np.nan)), "c.npy: holds numbers that are not finite"),
    (link_out, "c.npy: outside the folder"),
]


@pytest.mark.parametrize("damage, says", WRONG, ids=[says for _, says in WRONG])
def test_activations_that_cannot_be_used_are_one_clear_error(damage, says, outside):
    folder, _ = outside
    damage(folder)
    with pytest.raises((RunError, ParameterError), match=says):
        activations.open_named(str(folder)).verify()
