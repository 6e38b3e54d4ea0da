"""Limits that training's report, the gate and figures share."""

INERT, DOMINATING = 1e-3, 1.0
"""A term whose gradient share stays under the first, or over the second, through most of training is flagged."""
