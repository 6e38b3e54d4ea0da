"""Copies of the project for tests that change its files."""

import shutil

from sae_lib import runs


def copy(folder, *names):
    """Files and folders of the project, by ``names``, into ``folder``.

    Copies keep their caches of compiled code in the project's own: compiling anew takes minutes, and what is compiled
    is known by its source, wherever that lies.
    """
    for name in names:
        source = runs.project() / name
        if source.is_file():
            shutil.copy(source, folder / name)
            continue
        shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for module in [source, *source.rglob("*")] if name == "sae_lib" else []:
            if module.is_dir() and module.name != "__pycache__":
                (module / "__pycache__").mkdir(exist_ok=True)
                (folder / module.relative_to(runs.project()) / "__pycache__").symlink_to(module / "__pycache__")
