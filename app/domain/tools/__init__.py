"""The tools whose calls the server runs: one module per tool, registered in `table.py`."""
