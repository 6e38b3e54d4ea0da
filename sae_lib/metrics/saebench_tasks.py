"""What SAEBench's two sparse probings, SCR, TPP and unlearning report."""

from __future__ import annotations

from math import inf

from sae_lib.metrics.metric import Metric, listed
from sae_lib.metrics.saebench import DEAD, VERSION

PROBES_VERSION = f"sae-probes 0.4.2, {VERSION}"
PROBED = (1, 2, 5, 10, 20, 50, 100)
"""How many latents (or channels) a sparse probe may read."""
ABLATED = (2, 5, 10, 20, 50, 100, 500)
"""How many latents SCR and TPP ablate."""
PROBING, UNFIT = "SAEBench sparse probing", "; held unfit for ranking SAEs by arXiv 2605.18229"
PREFIX = "sae_probes_"
"""Before SAEBench's names of sae-probes' metrics, which its own sparse probing has too."""
SAE_PROBES = "sae-probes' normal setting, through SAEBench"
SCR, TPP = f"SAEBench SCR{UNFIT}", f"SAEBench TPP{UNFIT}"
NOTHING = "an SAE that changes nothing"


def _probes() -> list[Metric]:
    """Accuracies of linear probes on balanced pairs of classes: on an SAE's latents, and on the model's own stream."""
    found = []
    for k in (None, *PROBED):
        key = f"top_{k}_test_accuracy" if k else "test_accuracy"
        latents = "all latents" if k is None else f"the {k} latent{'s' * (k > 1)} that tell classes apart best"
        channels = latents.replace("latent", "channel")
        shown = f", top {k}" if k else ""
        found += [Metric(f"sae_{key}", f"Sparse probing{shown}", 1, "accuracy", PROBING, VERSION,
                         f"test accuracy of a linear probe on {latents}, mean over data sets", 0, 1, 0.5,
                         f"{DEAD} (chance)"),
                  Metric(f"llm_{key}", f"Model's own probing{shown}", 0, "accuracy", PROBING, VERSION,
                         f"the same on {channels} of the model's stream: no SAE is in it; it differs between layers",
                         0, 1, 0.5, "chance", of_model=True)]
    return found


def _sae_probes() -> list[Metric]:
    """What sae-probes says of linear probes on a text's last token: on k latents, and on the model's own stream.

    Classes are balanced, and so is a trivial accuracy of 0.5; a probe that says one class alone has an F1 of 1/3.
    """
    found = []
    for measure, label, unit, trivial, formula in (
            ("accuracy", "accuracy", "accuracy", 0.5, "share of test texts in the right class"),
            ("auc", "AUC", "area under the ROC curve", 0.5,
             "share of pairs of test texts of the two classes that a probe's score orders rightly"),
            ("f1", "F1", "F1, weighted mean of both classes", 1 / 3, "2 precision recall / (precision + recall)")):
        found.append(Metric(
            f"{PREFIX}llm_test_{measure}", f"sae-probes, model's own {label}", 0, unit, SAE_PROBES, PROBES_VERSION,
            f"{formula}, of an L2 logistic regression on all channels of the model's stream at a text's last token, "
            "mean over data sets: no SAE is in it; it differs between layers", 0, 1, trivial, "chance", of_model=True))
        found += [Metric(
            f"{PREFIX}sae_top_{k}_test_{measure}", f"sae-probes {label}, top {k}", 1, unit, SAE_PROBES,
            PROBES_VERSION, f"{formula}, of an L1 logistic regression on the {k} latent{'s' * (k > 1)} whose "
            "normalised means differ most between classes at a text's last token, mean over data sets", 0, 1, trivial,
            f"{DEAD} (chance)") for k in PROBED]
    return found


def _scr(n: int) -> list[Metric]:
    """Spurious correlation removal, n latents ablated: gain of a biased probe over its gap to the clean probe."""
    formula = ("(accuracy after ablation - biased probe's) / (clean probe's - biased probe's); 1 closes the gap, and "
               f"above 1 is beyond it; ablated: the {n} latents of ")
    return [Metric(f"scr_{key}_threshold_{n}", f"SCR{label}, {n} latents", 1, "share of the gap", SCR, VERSION,
                   formula + what, -inf, inf, 0, NOTHING)
            for key, label, what in (
                ("metric", "", "the attribute that the biased probe knows better"),
                ("dir1", " direction 1", "the spurious attribute, the intended accuracy watched"),
                ("dir2", " direction 2", "the intended attribute, the spurious accuracy watched"))]


def _tpp(n: int) -> list[Metric]:
    """Targeted probe perturbation, n latents ablated: what a class's probe loses, and what the others lose."""
    return [Metric(f"tpp_threshold_{n}_{key}", f"TPP{label}, {n} latents", direction, "accuracy lost", TPP, VERSION,
                   formula, -span, span, 0, NOTHING)
            for key, label, direction, span, formula in (
                ("total_metric", "", 1, 2, "loss of the class meant - mean loss of the other classes"),
                ("intended_diff_only", " intended", 1, 1, "accuracy that the probe of the class meant loses"),
                ("unintended_diff_only", " unintended", -1, 1, "accuracy that the other classes' probes lose, mean"))]


METRICS = listed(
    *_probes(), *_sae_probes(), *(metric for n in ABLATED for metric in _scr(n)),
    *(metric for n in ABLATED for metric in _tpp(n)),
    Metric("unlearning_score", "Unlearning", 1, "share of WMDP-bio answers lost", "SAEBench unlearning", VERSION,
           "1 - lowest accuracy on the WMDP-bio questions that the model knew, over the settings that keep 0.99 of the "
           "other subjects; the best of a sweep, so more settings raise it", 0, 1, 0, NOTHING),
)
