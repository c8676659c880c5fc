"""What a training run will take, before it is paid for: parameters, memory, work, time and layouts of ranks."""
