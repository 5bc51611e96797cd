"""The command line: one file a subcommand; parse -> one config -> one function."""
