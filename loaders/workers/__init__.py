"""Steps in worker processes: what is asked of them, what they answer, and how it travels."""
