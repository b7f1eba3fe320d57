"""How good a spike rule is: recorded curves, other rules, verdicts."""
