"""What remains: SQLAlchemy Core statements; the caller owns the transaction."""
