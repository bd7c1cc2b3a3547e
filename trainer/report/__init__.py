"""What a run shows: its page, its samples, its console."""
