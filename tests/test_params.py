"""Parameters: every fault is one sentence that names file, key and what would be right."""

import os
import subprocess
import sys

import pytest
import yaml

from sae_lib import params, runs, studies
from sae_lib.params import ParameterError, check


@pytest.mark.parametrize("stage, values, says", [
    ("train", {"kk": 3}, "file.yaml: unknown parameter 'kk'; did you mean 'k'"),
    ("extract", {"tokns": 3}, "did you mean 'tokens'"),
    ("train", {"k": "many"}, "file.yaml: k: Input should be a valid integer"),
    ("train", {"k": True}, "k: expected a number or a word"),
    ("train", {"k": 5000}, "k = 5000 is larger than d_sae = 4096"),
    ("train", {"lr": 0}, "lr: Input should be greater than 0"),
    ("train", {"architecture": "standard", "target_l0": 9999}, "target_l0 = 9999.0 must be below d_sae"),
    ("extract", {"spelling_share": 1.0}, "spelling_share: Input should be less than 1"),
    ("extract", {"corpus": {"news": -1}}, "corpus: every weight must be above 0"),
    ("extract", {"store": "cloud"}, "store: Input should be 'disk' or 'stream'"),
    ("eval", {"eval_preset": "quick"}, "eval_preset: Input should be"),
])
def test_faults_name_file_and_key(stage, values, says):
    with pytest.raises(ParameterError) as fault:
        check(stage, values, "file.yaml")
    assert says in str(fault.value)


def test_numbers_written_as_yaml_reads_them():
    """PyYAML reads 2e-4 as text."""
    assert check("train", yaml.safe_load("{lr: 2e-4, k: 64}")).lr == 2e-4


def test_names_of_other_stages_are_left_out():
    p = check("eval", {"k": 64, "tokens": 5, "eval_preset": "smoke"})
    assert p.eval_preset == "smoke" and not hasattr(p, "k")


def test_papermill_s_unknown_names_are_caught():
    namespace = {"In": ["", "k: int = 32  # active", "# Parameters\nkk = 64\nrun = 'mine'\n"], "k": 32, "kk": 64}
    with pytest.raises(ParameterError, match="unknown parameter 'kk'"):
        params.read("train", namespace)
    assert params.read("train", {"In": ["x = 3"], "x": 3, "k": 64}).k == 64


def test_a_store_is_named_by_its_inputs_alone(tmp_path):
    base = {"tokens": 1000}
    name = params.activations_name(check("extract", base))
    assert name == params.activations_name(check("train", base | {"k": 7, "seed": 3, "store_buffer_mb": 5}))
    for change in ({"tokens": 1001}, {"layer": 3}, {"dtype": "float32"}, {"corpus": {"news": 1, "wikipedia": 1}},
                   {"spelling_share": 0.1}, {"context": 64}, {"corpus_seed": 1}, {"max_norm_ratio": 5.0}):
        assert params.activations_name(check("extract", base | change)) != name, change
    text = tmp_path / "text.txt"
    text.write_text("one")
    before = params.activations_name(check("extract", {"corpus": str(text)}))
    text.write_text("two")
    assert params.activations_name(check("extract", {"corpus": str(text)})) != before


@pytest.mark.parametrize("name", ["../x", "a/b/c", "/etc", "a;rm", "", "a b", "$(x)", "a/../b", ".hidden"])
def test_unsafe_run_names_are_refused(name):
    with pytest.raises(ParameterError, match="is not a name"):
        runs.folder_of(name)


def test_every_study_expands_and_its_ingredients_check():
    files = sorted((runs.project() / "params/studies").glob("*.yaml"))
    assert files
    for file in files:
        members = studies.expand(file.stem)
        studies.check_ingredients(members)
        assert len({member.name for member in members}) == len(members)


def test_what_was_found_right_is_not_checked_again_and_what_was_wrong_is(tmp_path):
    code = "import sys; from sae_lib import studies; members = studies.expand('ci'); {change}" \
           "studies.check_ingredients(members); print('torch' in sys.modules)"
    environment = os.environ | {"SAE_WORKBOOK_CACHE": str(tmp_path)}
    wrong = "members[0].params['ingredients'] = [{'name': 'nothing'}]; "

    def checked(change=""):
        return subprocess.run([sys.executable, "-c", code.format(change=change)], env=environment, capture_output=True,
                              text=True)
    assert [checked().stdout, checked().stdout] == ["True\n", "False\n"]
    for _ in range(2):
        assert "nothing" in checked(wrong).stderr.splitlines()[-1]


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "project", lambda: tmp_path)
    for name, text in {"models/m.yaml": "model: tiny\nlayer: 0\n", "variants/v.yaml": "k: 8\nd_sae: 64\n",
                       "studies/s.yaml": "models: [m]\nvariants: [v]\nseeds: [1, 2]\nsweep: {k: [4, 8]}\n"}.items():
        (tmp_path / "params" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "params" / name).write_text(text)
    return tmp_path / "params"


def test_a_study_is_a_matrix(project):
    members = studies.expand("s")
    assert [m.name for m in members] == ["s/m-v-k=4-s1", "s/m-v-k=4-s2", "s/m-v-k=8-s1", "s/m-v-k=8-s2"]
    assert members[2].params == {"model": "tiny", "layer": 0, "k": 8, "d_sae": 64, "seed": 1, "run": "s/m-v-k=8-s1"}


@pytest.mark.parametrize("file, text, says", [
    ("variants/v.yaml", "kk: 8\n", "params/variants/v.yaml: unknown parameter 'kk'; did you mean 'k'"),
    ("variants/v.yaml", "k: [\n", "not valid YAML"),
    ("variants/v.yaml", "- k\n", "a mapping of names to values"),
    ("models/m.yaml", "layer: -1\n", "params/models/m.yaml: layer: Input should be greater"),
    ("studies/s.yaml", "variants: [nope]\nmodels: [m]\n", "known here: v"),
    ("studies/s.yaml", "variants: [../v]\n", "is not a name of a file"),
    ("studies/s.yaml", "variants: [v]\nseed: [1]\n", "studies/s.yaml: seed: Extra inputs"),
    ("studies/s.yaml", "variants: [v]\nmodels: [m]\nshared: {kk: 1}\n",
     "params/studies/s.yaml: unknown parameter 'kk'"),
])
def test_faults_in_a_study_name_its_file(project, file, text, says):
    (project / file).write_text(text)
    with pytest.raises(ParameterError) as fault:
        studies.expand("s")
    assert says in str(fault.value)


def test_writing_is_whole_or_not_at_all(tmp_path):
    path = runs.write_json(tmp_path / "a.json", {"x": float("nan"), "y": [1.5]})
    assert runs.read_json(path) == {"x": None, "y": [1.5]}
    with pytest.raises(ZeroDivisionError), runs.whole(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert runs.read_json(path)["y"] == [1.5] and list(tmp_path.iterdir()) == [path]
    path.write_text('{"x": ')
    with pytest.raises(runs.RunError, match="a.json: damaged JSON"):
        runs.read_json(path)


OWN_RATES = {"progressive": 4e-4, "progressive_seeds": 4e-4, "progressive_gemma": 2e-4, "temporal": 4e-4,
             "temporal_windows": 4e-4, "temporal_gemma": 2e-4 / (4608 / 16384) ** 0.5,
             "temporal_wide_gemma": 2e-4 / (18432 / 16384) ** 0.5, "hybrid": 3e-4, "hybrid_topk": 4e-4,
             "hybrid_gemma": 3e-4, "compression": 3e-4, "compression_gemma": 3e-4, "as_described": 3e-4}


@pytest.mark.parametrize("name", OWN_RATES)
def test_the_studies_train_with_their_own_rates(name):
    """2e-4 / sqrt(F / 16384) for TopK, 3e-4 for ReLU, whatever the defaults are; baselines share them."""
    for member in studies.expand(name):
        p = check("train", member.params)
        rate = 2e-4 / (p.d_sae / 16384) ** 0.5 if p.architecture == "topk" else 3e-4
        assert p.lr == rate == OWN_RATES[name]
        assert (p.warmup_steps, p.lr_decay) == (1000 if "gemma" in name else 100, 0.2)
        assert p.architecture != "topk" or p.aux_dead_after == 100_000
