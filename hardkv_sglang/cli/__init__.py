"""The `hardkv` command: `main.py` dispatches, one file per subcommand."""
