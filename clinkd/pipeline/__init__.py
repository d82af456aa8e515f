"""The stages of a run, each skipped while its inputs are unchanged."""
