"""What any training needs: loop, checkpoint, optimizer, moving average, gradient exchange, output."""
