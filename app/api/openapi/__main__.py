"""python -m app.api.openapi: writes the document that is served."""

from app.api.openapi.document import document, encoded
from app.api.reference import DOCUMENT

if __name__ == "__main__":
    DOCUMENT.write_bytes(encoded(document()))
