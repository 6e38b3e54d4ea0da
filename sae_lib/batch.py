"""papermill as the Snakefile calls it: it starts a second sooner (see ``sae_lib``) and ends with the batch engine."""

from papermill.__main__ import papermill

if __name__ == "__main__":
    papermill()
