"""What compares any two implementations, and proves that its own checks can fail."""
