"""The plain modules that the recipes train; they know nothing of debias."""
