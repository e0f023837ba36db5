"""Loss of whole documents without their routes: what a masked model is measured by."""

from __future__ import annotations

import numpy as np
import torch

from dbes.models.head import next_token_nats
from dbes.recording.batches import batches
from dbes.recording.forward import ForwardEngine
from dbes.trace.blocks import Work


def document_nats(engine: ForwardEngine, work: Work) -> np.ndarray:
    """Nats of every document, float64 [documents], windows and special tokens as they are recorded; the same batches in every call."""
    windows, nats = engine.windows(work), np.zeros(len(work.texts))
    planned = batches(windows, engine.budget, by_count=engine.batch_size is not None, batching=engine.batching, extra=engine.extra)
    with torch.inference_mode():
        for members in planned:
            inputs, rows = engine.inputs(members)
            found = next_token_nats(engine.loaded.model, inputs, torch.from_numpy(rows)).double().cpu().numpy()
            ends = np.cumsum([len(window) for window in members])
            for window, part in zip(members, np.split(found, ends[:-1]), strict=True):
                nats[window.document - work.first] += part.sum()
    return nats
