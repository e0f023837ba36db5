"""From a trace to scores: counts per document, metrics, resampling, tests, verdict. No model, no screen."""
