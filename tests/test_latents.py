"""What dashboards know of single latents: against dense codes, against TransformerLens' weights, planted tokens."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from sae_lib import params, runs
from sae_lib.data import language_model
from sae_lib.evaluation import hooked_model, latents, logit_effects, pairs, splits
from sae_lib.training import trainer
from sae_lib.training.ingredients import load_sae

SMALL = {"d_sae": 128, "k": 6, "samples": 12_000, "batch_size": 128, "lr": 2e-3, "warmup_steps": 10, "threads": 1}


@pytest.fixture(scope="module")
def trained(tiny, tiny_store):
    """A small run of the tiny model with its latents recorded."""
    p = params.check("train", tiny().model_dump() | SMALL | {"run": "latents/topk"})
    run = runs.start(p)
    trainer.train(p, tiny_store, run)
    return run, latents.record(run, tiny_store), tiny_store


def test_what_is_recorded_is_what_the_sae_does_on_held_out_text(trained):
    run, held, store = trained
    sae, rows = load_sae(run.path / "sae"), store.heldout(latents.TOKENS)
    codes = sae.encode(rows.x).numpy()
    np.testing.assert_allclose(held.codes.toarray(), codes, atol=1e-5)
    table = held.table
    np.testing.assert_allclose(table.density, (codes > 0).mean(0))
    np.testing.assert_allclose(table.largest, codes.max(0), atol=1e-5)
    fires = (codes > 0).any(0)
    np.testing.assert_allclose(table["mean"][fires], (codes.sum(0) / (codes > 0).sum(0).clip(1))[fires], rtol=1e-4)
    unit = torch.nn.functional.normalize(sae.W_dec.double(), dim=1)
    cosines = (unit @ unit.T).fill_diagonal_(0)
    np.testing.assert_allclose(np.abs(table.nearest_cosine), cosines.abs().max(1).values, atol=1e-6)
    best = int(np.argmax(codes[:, table.latent[fires].iloc[0]]))
    tokenizer, _ = language_model.load_tokenizer("tiny")
    assert held.tokens.text[best].strip() == tokenizer.decode([int(rows.token[best])]).strip()
    assert table.tokens[fires].iloc[0][0] == held.tokens.text[best]


def test_what_is_written_is_read_again_and_damage_is_one_error(trained):
    run, held, _ = trained
    again = latents.read(run)
    assert (again.codes != held.codes).nnz == 0 and again.notes == held.notes == []
    pd.testing.assert_frame_equal(again.table.drop(columns=["tokens", "raised", "lowered", "raised_by", "lowered_by"]),
                                  held.table.drop(columns=["tokens", "raised", "lowered", "raised_by", "lowered_by"]))
    file = run.path / "latents/tokens.parquet"
    kept = file.read_bytes()
    file.write_bytes(kept[:100])
    with pytest.raises(runs.RunError, match="latents: damaged .* run 02_train_variant again"):
        latents.read(run)
    file.write_bytes(kept)


def test_effects_on_logits_are_those_of_transformer_lens_weights(trained, tiny_model):
    """TransformerLens converts the final norm's gain (Gemma-2 stores it less one) and W_U by code of its own."""
    run, held, _ = trained
    rows, hooked = load_sae(run.path / "sae").W_dec, hooked_model.to_hooked(tiny_model)
    effects = (rows * hooked.ln_final.w.detach()) @ hooked.W_U.detach()
    found = logit_effects.logit_effects(rows, tiny_model, 4)
    top = effects.topk(4)
    np.testing.assert_allclose(found.raised_by, top.values, rtol=1e-4)
    np.testing.assert_allclose(found.lowered_by, effects.topk(4, largest=False).values, rtol=1e-4)
    assert (found.raised[:, 0] == top.indices[:, 0]).float().mean() > 0.98
    assert len(held.table.raised[0]) == latents.EFFECTS


def test_the_gain_of_a_norm_is_read_off_its_values():
    weight = torch.randn(16, generator=torch.Generator().manual_seed(0))
    norms = [torch.nn.LayerNorm(16), torch.nn.RMSNorm(16, eps=1e-6)]
    for norm in norms:
        norm.weight.data = weight.clone()
    norms[0].bias.data += 3.0
    for norm in norms:
        np.testing.assert_allclose(logit_effects.gain(norm, torch.zeros(2, 16)).detach(), weight, atol=1e-4)


def some_latents():
    """Ten tokens in two blocks; latent 0 fires on some of them, latent 1 on none."""
    values = np.zeros((10, 2), np.float32)
    values[[1, 2, 7], 0] = 1.0, 3.0, 2.0
    tokens = pd.DataFrame({"text": [f" t{n}" for n in range(10)], "document": 0, "block": [0] * 5 + [1] * 5,
                           "position": list(range(1, 6)) * 2})
    codes = sparse.csc_matrix(values)
    return latents.Latents(codes, tokens, latents.summary(codes, tokens.text), [])


def test_contexts_are_the_strongest_of_each_neighbourhood_and_stay_in_their_block():
    first, second = latents.contexts(some_latents(), 0, around=4)
    assert (first.strength, second.strength) == (3.0, 2.0)
    assert first.texts == [" t0", " t1", " t2", " t3", " t4"] and first.at == 2
    assert first.strengths == [0, 1, 3, 0, 0] and second.texts[second.at] == " t7" and second.texts[0] == " t5"
    assert latents.contexts(some_latents(), 1) == []
    spread = latents.contexts(some_latents(), 0, count=2, spread=True, around=1)
    assert [context.strength for context in spread] == [3.0, 1.0]


def test_the_summary_of_a_latent_that_never_fires():
    table = some_latents().table
    assert table.density.tolist() == [0.3, 0.0] and np.isnan(table["mean"][1]) and table.tokens[1] == []
    assert table.tokens[0] == [" t2", " t7", " t1"]


def test_history_of_a_latent(trained):
    run, held, _ = trained
    found = pairs.history(pairs.snapshots(run), 3)
    assert list(found.phase) == ["early", "middle", "late"] and found.cosine.iloc[-1] == pytest.approx(1, abs=1e-5)
    last = pairs.snapshots(run)[-1]
    assert found.density.iloc[-1] == pytest.approx(last.own[3] / last.tokens)
    assert last.own.sum() == pytest.approx(held.codes.nnz, rel=0.01)


def test_a_latent_in_a_wider_sae_is_found_with_the_tokens_that_it_covers():
    """A latent planted as two in a wider SAE: each covers its half of the tokens, together they cover all."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(4, 16, generator=draw), dim=1)
    wide = torch.nn.functional.normalize(torch.cat([rows[1:], rows[:1] + 0.1, rows[:1] - 0.1]), dim=1)
    narrow = np.zeros((40, 4), np.float32)
    narrow[:20, 0] = 1
    other = np.zeros((40, 5), np.float32)
    other[:10, 3], other[10:20, 4] = 1, 1
    tokens = pd.DataFrame({"document": 0, "block": 0, "position": range(40)})
    held, beside = (latents.Latents(sparse.csc_matrix(values), tokens, None, []) for values in (narrow, other))
    table, together = splits.in_another(0, rows, held, wide, beside, 2)
    assert set(table.latent) == {3, 4} and (table.cosine > 0.9).all()
    assert table.covers.tolist() == [0.5, 0.5] and table.within.tolist() == [1, 1] and together == 1
    _, unknown = splits.in_another(0, rows, held, wide, beside._replace(tokens=tokens.assign(position=1)), 2)
    assert unknown is None
