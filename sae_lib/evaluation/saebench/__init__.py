"""SAEBench's own evaluations of one of our SAEs. Only this folder knows the package.

``core`` is the function; first-letter absorption is in ``absorption`` with its words in ``letter_words``.
"""

from sae_lib.evaluation.saebench.core import PRESETS, Batches, _blocks, as_read, core, fit, left_out, packed

__all__ = ["PRESETS", "Batches", "_blocks", "as_read", "core", "fit", "left_out", "packed"]
