"""The library behind the SAE workbook.

Five rooms in the order of the flow: ``data`` (01), ``sae`` and ``training`` (02), ``evaluation`` (03, 04) and
``views`` (05). No room imports one to its right; ``params``, ``runs`` and ``metrics`` are the entrance.
"""

import sys

from sae_lib import presence

__version__ = "0.1.0"

# Here, because a kernel whose batch engine was killed must not begin to work.
presence.end_with_engine()

# jsonschema, which plotly and papermill import, builds a grammar for a format that no notebook has: a second a process.
sys.modules.setdefault("rfc3987_syntax", None)
