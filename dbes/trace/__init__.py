"""Recorded routes: what a token's route is, the folder that keeps it, and routers that need no model."""
