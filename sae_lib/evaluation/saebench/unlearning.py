"""SAEBench's unlearning evaluation: why it gives no figure here.

It counts questions on biology (WMDP) that a model answers only as long as certain latents stay. Only Gemma-2's
instruction-tuned models know enough of the answers; a smaller one has no question to lose, which would read as a score.
"""

from __future__ import annotations

from typing import Any

from sae_lib import runs

MODELS = ("gemma-2-2b-it", "gemma-2-9b-it")
"""The models that SAEBench runs it on."""


def unlearning(model: str, *, hook: str, identity: str, d_sae: int) -> dict[str, Any]:
    """A report with the reason why there is no figure: ``status`` is ``not applicable``, or ``not run``."""
    if model.rpartition("/")[2] in MODELS:
        status, reason = "not run", ("its forget corpus is gated on the hub, and this workbook does not run it yet; "
                                     "sae_bench.evals.unlearning does")
    else:
        status, reason = "not applicable", (f"only {' and '.join(MODELS)} answer its questions well enough, not "
                                            f"{model}; a model that cannot has nothing to unlearn")
    return {"eval": "unlearning", "status": status, "reason": reason, "metrics": {}, "provenance": runs.provenance(),
            "config": {"model": model, "model_identity": identity, "hook": hook, "d_sae": d_sae}}
