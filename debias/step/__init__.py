"""How a step is watched and rewritten; the only code that knows Lightning's internals."""
