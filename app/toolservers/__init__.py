"""Reference tool servers: MCP servers that the catalog can put behind hosted tools, programs of their own."""
