"""From tokenized corpora to training batches."""
