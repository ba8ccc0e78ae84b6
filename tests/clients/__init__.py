"""Real clients, connected as docs/clients.md says."""
