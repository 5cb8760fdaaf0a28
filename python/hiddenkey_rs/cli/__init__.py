"""The ``hiddenkey`` command: one file a subcommand."""
