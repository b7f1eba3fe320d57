"""What a model knows: tasks, the protocols that they are scored by, scores on any layout, and results with their errors."""
