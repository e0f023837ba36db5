"""From texts and a model to a trace."""
