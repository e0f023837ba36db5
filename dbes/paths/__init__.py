"""Expert paths: which cells of a model serve a domain, within a budget."""
