"""Ask a model what it knows: suites of tasks under a named protocol, with standard errors.

megalm evaluate runs/first --suite smoke
megalm evaluate SmolLM2-135M --suite core --protocol lm_eval
megalm evaluate runs/first --suite my-task.yaml --limit 100
"""
