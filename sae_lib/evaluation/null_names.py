"""What null baselines are called; apart from ``null_saes``, as a table of them has no use for torch."""

LABELS = {"random": "random SAE", "untrained": "untrained SAE", "pca": "principal components",
          "residual": "raw residual stream"}
"""Each null by its name in the parameters, in the order of tables."""
