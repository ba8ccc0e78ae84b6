"""The OpenAPI document of this server: `document` makes it from the routes, the wire format and the table of operations.

    python -m app.api.openapi    writes openapi.json, which `api/reference.py` serves

Requests never come here: what is served is the file.
"""
