"""A run: its folder, its session, its processes, what is held out and what is kept."""
