"""The methods as mixins for a LightningModule."""

from debias.methods import *

__all__ = sorted(name for name in vars() if name.endswith("Mixin"))
