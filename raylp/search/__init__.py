"""Find the layers a task can do without."""
