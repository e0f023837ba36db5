"""The routing testbed: mixes of distinguishable domains, tiny stock MoE models, routers and balancing, training, experiments.

Modules in the order data flows: ``mix`` (documents to batches), ``models`` (stock architectures), ``routers`` and ``balancing``
(what decides, what evens out), ``training`` (the loop), ``heldout`` (loss and routing on unseen documents), ``grid``,
``experiments`` and ``report``; ``embedded`` trains the checkpoint that ships with the repository.
"""
