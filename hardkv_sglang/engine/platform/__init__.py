"""SGLang platforms that this package adds; see `activate.py` for when."""
