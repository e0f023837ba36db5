"""One evaluation from task and model to a finished result."""
