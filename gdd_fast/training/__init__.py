"""What anything trains in: loop, checkpoint, optimizer, moving average, ranks, output."""
