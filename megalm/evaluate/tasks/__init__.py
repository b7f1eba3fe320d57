"""Where items come from: jsonl rows as gauntlet and CORE write them, lm-eval's YAML, and suites of both."""
