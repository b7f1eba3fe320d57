"""What a trained model can do: text written by it, and scores of it."""
