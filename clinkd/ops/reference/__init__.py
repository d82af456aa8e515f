"""The readable truth: every op in plain torch, float64 included, no branch for speed."""
