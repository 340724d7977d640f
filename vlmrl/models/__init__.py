"""Everything that imports transformers' models. Importing this package first works around wheels that cannot be
imported (broken_wheels.py) and would take transformers down with them."""

from vlmrl.models import broken_wheels

broken_wheels.install()
