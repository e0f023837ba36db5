"""Several results side by side: which may be compared, which differ, and whether a result is what it says."""
