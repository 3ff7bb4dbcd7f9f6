"""The report: schema, Pareto front, page, plots, regressions."""
