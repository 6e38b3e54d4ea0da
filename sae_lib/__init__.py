"""The library behind the SAE workbook.

Five rooms in the order of the flow: ``data`` (01), ``sae`` and ``training`` (02), ``evaluation`` (03, 04) and
``views`` (05). No room imports one to its right; ``params``, ``runs`` and ``metrics`` are the entrance.
"""

__version__ = "0.1.0"
