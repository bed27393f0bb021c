"""Loss, optimizer, schedule, step and loop."""
