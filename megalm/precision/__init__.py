"""Number formats: of weights, activations, masters and sums, and how each matrix product is computed."""
