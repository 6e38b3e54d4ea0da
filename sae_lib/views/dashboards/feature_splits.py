"""Feature splits: a letter's latents, the words that its main latent misses, and a latent in another SAE."""

from __future__ import annotations

import contextlib

import ipywidgets as widgets

from sae_lib import runs
from sae_lib.evaluation import latents, pairs, splits
from sae_lib.views import figures_splits as figures
from sae_lib.views.dashboards.base import dropdown, number, verdict
from sae_lib.views.dashboards.inspector import WithInspector
from sae_lib.views.figures import caption

NONE = "no other run"


def _wider(run: runs.Run, others: list[str]) -> str:
    """The first of the other runs that is valid and wider, else the first that is valid."""
    def width(name: str) -> int:
        return (runs.Run(name).json("sae/cfg.json") or {}).get("d_sae", 0)

    valid = [name for name in others if (runs.Run(name).json("validity.json") or {}).get("status") == "valid"]
    return next((name for name in valid if width(name) > width(run.name)), (valid or [NONE])[0])


class FeatureSplits(WithInspector):
    """For a letter, and for a latent beside a wider SAE."""

    parts = ("split", "words", "in_another")
    affects = {"letter": ("split", "words"), "seed": ("split", "words"), "other": ("in_another",),
               "latent": ("in_another",)}

    def __init__(self, run: runs.Run, others: list[str] = (), letter: str | None = None):
        """Raises RunError where 04 left nothing to show."""
        self.run, self.found, self.others = run, splits.read(run), [name for name in others if name != run.name]
        probed = self.found.letters[self.found.letters.f1_by_k.notna()]
        self.letters, self.seeds = sorted(probed.letter.unique()), sorted(int(seed) for seed in probed.seed.unique())
        best = probed.assign(splits=probed.split_latents.map(len)).sort_values("splits", ascending=False)
        letter = letter if letter in self.letters else best.letter.iloc[0]
        super().__init__(letter=letter, seed=self.seeds[0], latent=0, other=_wider(run, self.others))
        self.title, self.notices = f"Feature splits in {run.name}", verdict(run)
        self.rows = pairs.last(run).rows
        self.caption = caption(run.name, run.json("training.json"))
        self.state["latent"] = self.split().latents[0].item()
        self._others: dict[str, tuple] = {}

    def split(self) -> splits.Split:
        """The letter of the state."""
        return splits.split(self.found, self.state["letter"], self.state["seed"], self.rows)

    def draw(self, part: str):
        """A part for the letter, or the latent, of the state."""
        letter, seed = self.state["letter"], self.state["seed"]
        if part == "split":
            return figures.split(self.split(), letter, self.run.name, f"{self.caption}; evaluation seed {seed}")
        if part == "words":
            own = self.found.words
            asked = int(((own.letter == letter) & (own.seed == seed)).sum())
            return figures.words(splits.silent_words(self.found, letter, seed), letter,
                                 int(self.split().latents[0]), asked)
        return self._in_another()

    def _in_another(self):
        name = self.state["other"]
        if name == NONE:
            raise runs.RunError("choose another run of this model, a wider one say, to see how a latent splits there")
        if name not in self._others:
            run = runs.Run(name)
            if not run.finished:
                raise runs.RunError(f"run '{name}': no SAE in it")
            self._others[name] = pairs.last(run).rows, latents.read(run)
        if not hasattr(self, "_held"):
            self._held = latents.read(self.run)
        latent = min(self.state["latent"], len(self.rows) - 1)
        rows, held = self._others[name]
        table, together = splits.in_another(latent, self.rows, self._held, rows, held)
        return figures.in_another(table, together, latent, len(self.rows), name, len(rows), self.run.name, self.caption)

    def make_controls(self) -> dict[str, widgets.Widget]:
        """Letter, seed of the evaluation, a latent, and the run in which it is looked for."""
        return {"letter": dropdown(self.letters, self.state["letter"], "letter"),
                "seed": dropdown(self.seeds, self.state["seed"], "evaluation seed"),
                "latent": number(self.state["latent"], len(self.rows) - 1, "latent"),
                "other": dropdown([NONE, *self.others], self.state["other"], "in run")}

    def extra(self) -> list[widgets.Widget]:
        """The way to the inspector."""
        return [self.inspect_button()]

    def _apply(self, changes) -> None:
        # A letter brings its main latent along.
        if {"letter", "seed"} & set(changes) and "latent" not in changes:
            self.state |= changes
            with contextlib.suppress(runs.RunError):  # the letter's own part says it
                changes = changes | {"latent": int(self.split().latents[0])}
        super()._apply(changes)

    def clicked(self, part: str, point) -> None:
        """A latent of the first figure is inspected; one of another run too, in that run."""
        if part == "split" and point["trace"] in (0, 3, 4):
            self.set(latent=int(point["customdata"] if point["trace"] == 0 else point["y"]))
            self.inspect_chosen()
        elif part == "in_another":
            self.inspect(runs.Run(self.state["other"]), int(point["x"]))
