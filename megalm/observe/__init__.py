"""What a run shows: metrics, events, the console, TensorBoard and the report."""
