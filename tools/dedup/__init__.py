"""Find and take out what a corpus holds twice."""
