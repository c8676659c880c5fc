"""What `v32 plan` says, held against the model, the allocator and the counts of `v32 bench`."""
