"""Valid requests of every kind, broken in every way that comes to a seeded generator's mind.

Whatever is sent, no reply may be a 5xx, no run may fail by a mistake of ours, every refusal is in the API's own shape and names
the parameter, and what is refused has asked nothing of the upstream.

    python -m tests.fuzz --requests 30000 --seed 1              on servers of its own
    python -m tests.fuzz --requests 1 --seed 1 --first 4711     one of them again
    python -m tests.fuzz --documented --requests 50 --seed 1    requests that schemathesis makes from the OpenAPI document

The suite sends some hundred of them (`tests/api/test_fuzz.py`).
"""
