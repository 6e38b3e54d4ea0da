"""Dashboards on a run's folder or a study: each opens with whatever is there, and says in a sentence what is not.

In JupyterLab ``dashboards.run("quickstart/smollm2-topk-s42").widget`` shows all of one run. Those of latents are
imported when asked for, as they need torch, which a page shows its verdicts without; their modules therefore have names
of their own (importing one would put it in the place of a function here that is called the same).
"""

from __future__ import annotations

import pandas as pd
from IPython.display import display

from sae_lib import runs
from sae_lib.views.dashboards.base import Dashboard, Sentence
from sae_lib.views.dashboards.compare import Compare, RunTabs, opened
from sae_lib.views.dashboards.curves import Curves, RunCurves


def run(name: str) -> RunTabs:
    """The four dashboards of a run, in tabs. Raises ParameterError where no run has this name."""
    return RunTabs(name, beside(name))


def latents(name: str, latent: int | None = None) -> Dashboard:
    """The latent inspector of a run."""
    from sae_lib.views.dashboards.inspector import Inspector

    return opened(Inspector, runs.Run(name), latent)


def coactivation(name: str) -> Dashboard:
    """Which latents of a run fire together."""
    from sae_lib.views.dashboards.coactivation_matrix import Coactivation

    return opened(Coactivation, runs.Run(name), beside(name))


def splits(name: str, letter: str | None = None) -> Dashboard:
    """How a run's letters split."""
    from sae_lib.views.dashboards.feature_splits import FeatureSplits

    return opened(FeatureSplits, runs.Run(name), beside(name), letter)


def curves(name: str) -> Dashboard:
    """Training curves of a finished run."""
    return opened(RunCurves.of, runs.Run(name))


def live_curves(name: str, mode: str) -> RunCurves:
    """Training curves to hand to ``trainer.train`` as ``watch``: displayed now, or, in a batch, not at all."""
    board = RunCurves(name, pd.DataFrame())
    board.waiting = True
    if mode == "live":
        display(board.widget)
    return board


def compare(comparison) -> Dashboard:
    """Any figure of a study's runs against any other."""
    return opened(Compare, comparison)


def curves_by_run(comparison, caption: str = "") -> Dashboard:
    """Training curves of a study's runs."""
    return opened(Curves, comparison.histories, comparison.table, caption)


def coactivation_by_run(comparison) -> Dashboard:
    """Pairs of the baseline's first run that is a result, beside the study's others."""
    from sae_lib.evaluation import results
    from sae_lib.views.dashboards.coactivation_matrix import Coactivation

    table = results.results(comparison.table)
    if table.empty:
        return Sentence(f"Study '{comparison.study}' has no valid run whose pairs could be shown.")
    own = results.baselines(comparison.table, comparison.baseline)
    base = table[table.variant == own[table.index[0]]]
    first = (base if len(base) else table).run.iloc[0]
    return opened(Coactivation, runs.Run(first), [name for name in comparison.table.run if name != first])


def beside(name: str) -> list[str]:
    """The other finished runs in a run's study."""
    folder = runs.folder_of(name)
    found = sorted(path.parent.parent for path in folder.parent.glob("*/sae/cfg.json"))
    return [path.relative_to(runs.home() / "runs").as_posix() for path in found if path != folder]
