"""Several ranks against one process: the world that runs them, what is compared, and known bugs that only they have."""
