"""What travels: msgspec Structs, nothing else."""
