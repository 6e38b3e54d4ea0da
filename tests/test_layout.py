"""The house keeps its order: rooms import leftwards, modules stay small, notebooks are clean and documented."""

import ast
import subprocess
import sys

import nbformat
import papermill
import pytest

from sae_lib import params, runs

ROOMS = ["data", "sae", "training", "evaluation", "views"]

MODULES = sorted((runs.project() / "sae_lib").rglob("*.py"))
NOTEBOOKS = {"extract": "01_extract", "train": "02_train_variant", "eval": "03_eval",
             "letters": "04_letter_absorption", "compare": "05_compare"}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.name)
def test_no_room_imports_one_to_its_right(path):
    parts = path.relative_to(runs.project() / "sae_lib").parts
    room = parts[0] if parts[0] in ROOMS else None
    for name in imports(path):
        room_named = name.split(".")[1] if name.startswith("sae_lib.") else ""
        if room and room_named in ROOMS:
            assert ROOMS.index(room_named) <= ROOMS.index(room), f"{path}: {name}"
        if room != "data" or path.name != "language_model.py":
            assert name.split(".")[0] != "transformers" or path.name == "tiny_model.py", f"{path}: {name}"
        if name.split(".")[0] == "sae_bench":
            assert parts[:2] == ("evaluation", "saebench"), f"{path}: {name}"
        if path.name.startswith("figures"):
            assert name.split(".")[0] != "ipywidgets"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.name)
def test_modules_are_small_and_documented(path):
    text = path.read_text()
    assert text.count("\n") < 300
    tree = ast.parse(text)
    assert not text.strip() or ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{path}: {node.name} is too long"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"


def test_planning_imports_neither_torch_nor_transformers():
    code = "import sys; from sae_lib import params, runs, studies; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_comparison_says_its_verdicts_before_torch_is_imported():
    """In the order of 05's page: up to what stands apart, and the study's dashboard, no cell needs it."""
    held = nbformat.read(runs.project() / "notebooks/05_compare.ipynb", as_version=4).cells
    cells = [cell.source for cell in held if cell.cell_type == "code"]
    explore = next(place for place, cell in enumerate(cells) if "dashboards.compare(comparison)" in cell)
    lines = [line for cell in cells[:explore + 1] for line in cell.splitlines() if line.startswith("from sae_lib")]
    assert len(lines) >= 4 and not any("show.figure" in cell for cell in cells[:explore])
    code = "\n".join([*lines, "import sys",
                      "names = ('torch', 'numba', 'scipy.stats', 'rfc3987_syntax')",
                      "sys.exit(' '.join(name for name in names if sys.modules.get(name)) or 0)"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("stage, name", NOTEBOOKS.items())
def test_notebooks_declare_every_parameter_typed_and_documented(stage, name):
    notebook = nbformat.read(runs.project() / f"notebooks/{name}.ipynb", as_version=4)
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    lines = [line for line in tagged[0].source.splitlines() if line.strip()]
    found = {}
    for line in lines:
        node = ast.parse(line).body[0]
        assert isinstance(node, ast.AnnAssign), line
        assert line.partition("  # ")[2].strip(), f"{name}: no comment: {line}"
        found[node.target.id] = ast.literal_eval(node.value)
    defaults = {key: field.get_default(call_default_factory=True)
                for key, field in params.STAGES[stage].model_fields.items()}
    assert found == defaults
    assert params.check(stage, found, name)
    # papermill reads a line by a pattern of its own, which an equals sign in the comment defeats.
    assert set(papermill.inspect_notebook(str(runs.project() / f"notebooks/{name}.ipynb"))) == set(found)


@pytest.mark.parametrize("name", NOTEBOOKS.values())
def test_notebooks_hold_calls_and_prose(name):
    notebook = nbformat.read(runs.project() / f"notebooks/{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
            assert not any(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in ast.parse(cell.source).body)


def test_notebooks_are_stripped_and_the_code_is_clean():
    files = [str(path) for path in sorted((runs.project() / "notebooks").glob("*.ipynb"))]
    extra = ["--extra-keys", "metadata.papermill cell.metadata.papermill"]
    subprocess.run([sys.executable, "-m", "nbstripout", "--verify", *extra, *files], check=True)
    subprocess.run([sys.executable, "-m", "ruff", "check", str(runs.project())], check=True)
