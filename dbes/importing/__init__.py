"""Routing that was recorded elsewhere, as a trace or as counts.

The flow, each step a module:

    sources (files)                        `sources`: what was given, file by file; `detection` says which format they are
      -> a format (`vllm`, `imatrix`, ...) reads them, checks what the format promises, and yields one of
           `Document`    routes [tokens, layers, slots] of a text, -1 where a row is missing
           `CountTable`  hits [layers, experts] where nothing else is known
      -> `domain_map` names the domain (and the source text) of each
      -> `sizes` says which layers are MoE layers, how many experts they have and how many a token takes
      -> `routes` writes documents as a trace, shard by shard; `tables` adds tables up to counts
      -> `importing.import_routing` puts these together, and tells what was dropped

Nothing is guessed: sizes come from the file, the model's config or the caller, missing rows stay missing, and what does not fit is an
error that names the file and the line or field. Files of a format are read through a bounded reader (`reading`); nothing is unpickled.
"""
