"""How steps of a LightningModule are wrapped and fed; the only code that knows Lightning's internals."""
