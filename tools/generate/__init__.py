"""Let a trained model go on from a text."""
