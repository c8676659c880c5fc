"""Time and memory, against floors: each test needs the machine to itself."""
