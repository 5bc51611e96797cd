"""Jobs: options, plan, tasks, finish."""
