"""What it means: pure functions and reducers. No await, no clock, no dice except as arguments."""
