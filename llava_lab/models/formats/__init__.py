"""Checkpoint formats: original LLaVA folders, the compact file, smol's parts."""
