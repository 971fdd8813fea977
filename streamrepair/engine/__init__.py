"""Plan, memory, budget, tasks and where they run."""
