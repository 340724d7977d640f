"""Everything that imports transformers' models. Beside wheels that cannot be imported, transformers cannot either."""

from vlmrl.models import broken_wheels

broken_wheels.install()
