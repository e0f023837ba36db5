"""Training of chosen experts only: every other tensor and slice of the model stays as it is, bit for bit."""
