"""Self-contained HTML pages: plots as SVG, tables, one style for light and dark; no script, nothing loaded from elsewhere.

The planner's answers, the report of a run and the guard's replay are such pages. Pure: imports nothing of megalm.
"""
