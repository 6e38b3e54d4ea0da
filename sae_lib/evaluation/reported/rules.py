"""What is wrong with a reported record: rules over its data, each with its sentence.

A rule finds a record (or the figures of one of its evaluations) *degenerate* (no score at all) or *not comparable*
with its study's baseline; anything else is a *remark*, which a reader should know.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from sae_lib.evaluation.reported.records import STUDIES, Record
from sae_lib.evaluation.results import L0_TOLERANCE
from sae_lib.metrics import METRICS

DEGENERATE, APART, REMARK = "degenerate", "not comparable", "remark"
CHANCE = 0.5
CLOSE = 1e-9
COMPARED = {"layer": "layer", "d_sae": "width F", "k": "k", "steps": "steps"}


class Annotation(NamedTuple):
    """One thing that is wrong with a record."""

    rule: str
    sentence: str
    weight: str = REMARK
    figures: tuple[str, ...] = ()
    """The figures that it is about; empty for the whole record."""


class Judged(NamedTuple):
    """A record with what is wrong with it."""

    record: Record
    annotations: list[Annotation]

    @property
    def status(self) -> str:
        """``degenerate``, ``not comparable`` or ``reported``."""
        found = {note.weight for note in self.annotations if not note.figures}
        return DEGENERATE if DEGENERATE in found else APART if APART in found else "reported"

    @property
    def why(self) -> str:
        """Why it does not stand beside its study's baseline, in words; empty where it does."""
        if self.status == DEGENERATE:
            return "degenerate: what a dead or untrained SAE scores is no score"
        return "; ".join(note.sentence for note in self.annotations if note.weight == APART and not note.figures)

    @property
    def wrong(self) -> str:
        """Every sentence, the gravest first."""
        order = (DEGENERATE, APART, REMARK)
        return "; ".join(note.sentence for note in sorted(self.annotations, key=lambda a: order.index(a.weight)))

    def faulty(self, metric: str) -> bool:
        """Whether a figure of its is no result, or of something else."""
        return self.status != "reported" or any(metric in note.figures and note.weight != REMARK
                                                for note in self.annotations)

    def stands(self, metric: str) -> bool:
        """Whether it has a figure that may be averaged and ranked."""
        return metric in self.record.figures and not self.faulty(metric) and not METRICS[metric].of_model


def judge(records: list[Record]) -> list[Judged]:
    """Apply every rule to every record; each sees the others, among them its study's baseline."""
    found = [Judged(record, [note for rule in RULES for note in rule(record, records)]) for record in records]
    dead = {one.record.name for one in found if one.status == DEGENERATE}
    return [one._replace(annotations=[*one.annotations, *_differs(one.record, records, dead)]) for one in found]


def baseline_of(record: Record, records: list[Record]) -> Record | None:
    """The run that its study compares it with; None for that run itself."""
    base = STUDIES[record.study].base
    found = next((other for other in records if other.study == record.study and other.variant == base), None)
    return None if found is None or found.run == record.run else found


# -- no score ----------------------------------------------------------------------------------------------------

def _never_trained(record: Record, _: list[Record]) -> Iterator[Annotation]:
    if record.steps == 0:
        yield Annotation("never trained", "never trained: 0 steps", DEGENERATE)


def _empty(record: Record, _: list[Record]) -> Iterator[Annotation]:
    if record.l0 == 0:
        yield Annotation("nothing active", "L0 is 0: no latent is active", DEGENERATE)


def _below_the_mean(record: Record, _: list[Record]) -> Iterator[Annotation]:
    variance = record.figures.get("core/explained_variance")
    if variance is not None and variance <= 0:
        yield Annotation("explained variance", f"explained variance {variance:.3g} is not above 0, what predicting the "
                                               "mean scores", DEGENERATE)


def _reconstructs_nothing(record: Record, records: list[Record]) -> Iterator[Annotation]:
    error = record.figures.get("core/mse")
    nothing = [other for other in records if other.figures.get("l2_norm_out") == 0 and "core/mse" in other.figures]
    for other in nothing if error is not None else ():
        if abs(error - other.figures["core/mse"]) <= CLOSE * error:
            whose = "" if other is record else f", {other.run}'s"
            yield Annotation("error of nothing", f"squared error {error:.4g} is that of an output of 0{whose}",
                             DEGENERATE)
            return


def _no_absorption(record: Record, _: list[Record]) -> Iterator[Annotation]:
    if (record.figures.get("mean_absorption_score"), record.figures.get("mean_num_split_features")) == (0, 1):
        yield Annotation("no score", "absorption 0.0 with 1.0 split features: what a dead SAE scores", DEGENERATE)


def _chance(record: Record, _: list[Record]) -> Iterator[Annotation]:
    found = [value for name, value in record.figures.items() if name.startswith("sae_") and name in METRICS]
    if found and all(abs(value - CHANCE) <= CLOSE for value in found):
        yield Annotation("chance", f"SAE accuracy is at chance ({CHANCE})", DEGENERATE)


# -- not to be compared ------------------------------------------------------------------------------------------

def _not_sparse(record: Record, _: list[Record]) -> Iterator[Annotation]:
    if record.l0 is not None and record.l0 > record.d_in / 2:
        yield Annotation("not sparse", f"not sparse: L0 {record.l0:.0f} of {record.d_sae} latents is above half the "
                                       f"model's width ({record.d_in})", APART)


def _nothing_reported(record: Record, _: list[Record]) -> Iterator[Annotation]:
    if not record.figures:
        yield Annotation("nothing reported", "no figures reported", APART)


def _shared(record: Record, records: list[Record]) -> Iterator[Annotation]:
    """Another run has the same evaluation attached, or the same figures to the last digit."""
    others = [other for other in records if other is not record]
    for name, part in record.evals.items():
        held = part.get("eval_id")
        same = [other.name for other in others if held and (other.evals.get(name) or {}).get("eval_id") == held]
        if same:
            yield Annotation("another record", f"its {name} record is also attached to {', '.join(same)} (one eval_id)",
                             APART, _figures_of(record, name))
    prose = {name: value for name, value in record.figures.items() if record.of[name] == "prose"}
    same = [other.run for other in others if other.study == record.study and prose and other.figures == prose]
    if same:
        whose = ", ".join(same) if len(same) < 4 else f"{len(same)} other runs, {same[0]} to {same[-1]}"
        yield Annotation("another record", f"every figure equals that of {whose}", APART, tuple(prose))


def _another_sae(record: Record, _: list[Record]) -> Iterator[Annotation]:
    """An evaluation whose SAE is not the one that was trained, or not the other evaluations'."""
    saes = {name: part["sae_cfg_dict"] for name, part in record.evals.items() if "sae_cfg_dict" in part}
    kinds = [sae["architecture"] for sae in saes.values()]
    for name, sae in saes.items():
        common = max(kinds, key=kinds.count)
        apart = [f"d_sae {sae['d_sae']} (trained: {record.d_sae})"] if sae["d_sae"] != record.d_sae else []
        apart += [f"architecture {sae['architecture']} (its others: {common})"] if sae["architecture"] != common else []
        if apart:
            yield Annotation("another record", f"its {name} record is of another SAE: {', '.join(apart)}", APART,
                             _figures_of(record, name))


def _settings(record: Record, records: list[Record]) -> Iterator[Annotation]:
    """Evaluation settings other than the baseline's: which keys, and how."""
    base = baseline_of(record, records)
    for name, own in record.settings.items() if base else ():
        theirs = base.settings.get(name)
        apart = [f"{key} {_short(own.get(key))} against {_short(theirs.get(key))}" for key in sorted({*own, *theirs})
                 if own.get(key) != theirs.get(key)] if theirs else []
        if apart:
            yield Annotation("settings", f"{name} with other settings than {base.run}'s: {', '.join(apart)}", APART,
                             _figures_of(record, name))


def _differs(record: Record, records: list[Record], dead: set[str]) -> Iterator[Annotation]:
    """Another place than its baseline's. Beside a baseline that is no SAE, nothing is known to differ."""
    base = baseline_of(record, records)
    if base is None or base.name in dead:
        return
    apart = [f"{label} {getattr(record, key)} against {getattr(base, key)}" for key, label in COMPARED.items()
             if None not in (getattr(record, key), getattr(base, key)) and getattr(record, key) != getattr(base, key)]
    if record.l0 is not None and base.l0 and abs(record.l0 - base.l0) > L0_TOLERANCE * base.l0:
        apart.append(f"L0 {record.l0:.4g} against {base.l0:.4g}")
    if apart:
        yield Annotation("apart", f"does not compare with {base.run}: {', '.join(apart)}", APART)


# -- to be known -------------------------------------------------------------------------------------------------

def _contradicts_itself(record: Record, _: list[Record]) -> Iterator[Annotation]:
    asked, said = record.configuration, record.summary
    pairs = [("lr", asked.get("lr"), said.get("learning_rate"), "its configuration", "its summary"),
             ("steps", asked.get("steps"), said.get("training_steps"), "its configuration", "its summary"),
             ("width F", asked.get("dict_size"), said.get("dict_size"), "its configuration", "its summary"),
             ("layer", record.layer, said.get("layer"), "its evaluation", "its summary"),
             ("k", asked.get("k"), record.l0, "its configuration", "its evaluation's L0")]
    for what, one, other, here, there in pairs:
        if None not in (one, other) and abs(one - other) > 1e-6 * abs(one):
            yield Annotation("contradicts itself", f"{what} is {one:.4g} in {here}, {other:.4g} in {there}")


def _other_letters(record: Record, records: list[Record]) -> Iterator[Annotation]:
    base = baseline_of(record, records)
    if base and record.letters and base.letters and set(record.letters) != set(base.letters):
        apart = [f"{word} {', '.join(sorted(letters))}" for word, letters in (
            ("without", set(base.letters) - set(record.letters)), ("with", set(record.letters) - set(base.letters)))
            if letters]
        yield Annotation("letters", f"absorption over {len(record.letters)} letters ({', '.join(apart)}), {base.run}'s "
                                    f"over {len(base.letters)}", REMARK, _figures_of(record, "absorption"))


def _prose(record: Record, _: list[Record]) -> Iterator[Annotation]:
    if record.figures and set(record.of.values()) == {"prose"}:
        yield Annotation("prose only", "figures from prose only: no evaluation record shows settings or letters")


def _model_alone(record: Record, _: list[Record]) -> Iterator[Annotation]:
    names = tuple(name for name in record.figures if METRICS[name].of_model and record.of[name] == "prose")
    if names:
        yield Annotation("model's own", "its LLM accuracies are the model's own, at one layer: no SAE moved them",
                         REMARK, names)


def _no_number(record: Record, _: list[Record]) -> Iterator[Annotation]:
    if record.missing:
        yield Annotation("no number", "no number for " + ", ".join(METRICS[name].label for name in record.missing),
                         REMARK, tuple(record.missing))


def _figures_of(record: Record, evaluation: str) -> tuple[str, ...]:
    return tuple(name for name, place in record.of.items() if place == evaluation)


def _short(value: Any, longest: int = 60) -> str:
    text = str(value)
    return text if len(text) <= longest else text[:longest - 3] + "..."


RULES = (_never_trained, _empty, _below_the_mean, _reconstructs_nothing, _no_absorption, _chance, _not_sparse,
         _nothing_reported, _shared, _another_sae, _settings, _contradicts_itself, _other_letters, _prose, _model_alone,
         _no_number)
