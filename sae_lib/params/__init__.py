"""Typed parameters of each stage, and the one check that every value passes before work starts.

Names are flat so that ``papermill -p k 64`` reaches each. A stage ignores names of other stages and rejects
names that no stage knows. Nothing here imports torch or transformers: planning must stay quick.
"""

from sae_lib.params.checking import ParameterError, check, load_yaml, nearest, read
from sae_lib.params.naming import ALIASES, EXTRACT_INPUTS, activations_name, digest, local_path
from sae_lib.params.stages import STAGES, VOCABULARY, Common, Compare, Evaluate, Extract, Letters, Train

__all__ = ["ALIASES", "EXTRACT_INPUTS", "STAGES", "VOCABULARY", "Common", "Compare", "Evaluate", "Extract", "Letters",
           "ParameterError", "Train", "activations_name", "check", "digest", "load_yaml", "local_path", "nearest",
           "read"]
