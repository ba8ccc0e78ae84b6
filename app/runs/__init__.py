"""Making a response happen."""
