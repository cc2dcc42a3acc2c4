"""Callbacks that watch without changing anything."""
