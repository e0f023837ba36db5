"""dbes."""
