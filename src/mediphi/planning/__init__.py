"""What a run will need, before it starts: memory by item, time, and changes that would fit."""
