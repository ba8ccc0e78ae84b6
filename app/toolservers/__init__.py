"""Reference tool servers: MCP servers for hosted tools, as separate programs."""
