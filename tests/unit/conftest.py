"""How the properties are tried: without deadlines; on CI always with the same examples."""

import os

from hypothesis import settings

settings.register_profile("local", deadline=None, max_examples=100)
settings.register_profile("ci", deadline=None, max_examples=200, derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "local")
