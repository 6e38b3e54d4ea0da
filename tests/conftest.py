"""Shared fixtures: a home and a cache of the tests' own, and one small store of the model ``tiny``."""

import os
import shutil

# Before numpy is imported: the library's own threads are set where it works, but OpenBLAS would take all cores in each
# worker for matrices of a few rows, and its idle threads keep the other worker from its core.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Before torch is: a thread that waits for the others of its product gives its core to the other workers, where it would
# spin. Two runs of test_browser took five times the processor's time.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import pytest
import torch

from sae_lib import params
from sae_lib.data import language_model

TINY = {"model": "tiny", "layer": 1, "dtype": "float32", "corpus": "tiny", "tokens": 6000, "context": 32,
        "store_shard_tokens": 1024, "mode": "batch", "device": "cpu"}

LONG = ("test_snakefile.py", "test_browser.py", "test_notebooks.py")
"""Files of few tests that take minutes."""

# Before a test module imports a package that imports it, beside a torchvision that does not load.
language_model.import_transformers()


def pytest_xdist_auto_num_workers(config):
    """One more than there are cores: who waits for a browser or for snakemake leaves his to the others."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items):
    """LONG files begin first, so that no worker ends with one of them while the others have nothing left."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session", autouse=True)
def workbook_home(tmp_path_factory):
    """Runs, activations and downloads go to a folder of the session's; one thread, so that figures are repeatable."""
    torch.set_num_threads(1)
    before = {name: os.environ.get(name) for name in ("SAE_WORKBOOK_HOME", "SAE_WORKBOOK_CACHE", "BROWSER_PATH")}
    home = tmp_path_factory.mktemp("home")
    # Pictures take a browser's start a page; the tests of pictures ask for one.
    os.environ.update(SAE_WORKBOOK_HOME=str(home), SAE_WORKBOOK_CACHE=str(home / "cache"), BROWSER_PATH="none")
    yield home
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(scope="module", autouse=True)
def nothing_kept(workbook_home):
    """Each file of tests is the first to keep what evaluations need of a model, whatever ran before it."""
    shutil.rmtree(workbook_home / "cache" / "evaluation", ignore_errors=True)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A home of the test's own, for what damages or interrupts; the cache is shared."""
    monkeypatch.setenv("SAE_WORKBOOK_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="session")
def tiny():
    """Make checked extraction parameters of the tiny model, with changes."""
    return lambda **changes: params.check("extract", TINY | changes)


@pytest.fixture(scope="session")
def tiny_model(workbook_home):
    """The tiny model, whole, read after its first block."""
    return language_model.load("tiny", hook="blocks.0.hook_resid_post", dtype="float32", device="cpu", whole=True)


@pytest.fixture(scope="session")
def tiny_named(workbook_home, tmp_path_factory):
    """Load the tiny Gemma-2, whole, from a folder of a user's with a name of the hub's."""
    def load(name):
        folder = tmp_path_factory.mktemp("models") / name
        shutil.copytree(language_model.folder_of("tiny"), folder)
        return language_model.load(str(folder), hook="blocks.0.hook_resid_post", dtype="float32", device="cpu",
                                   whole=True)
    return load


@pytest.fixture(scope="session")
def tiny_store(tiny):
    """About 6,000 rows of the tiny model in six shards, and some held out."""
    from sae_lib.data import activations

    return activations.extract(tiny())
