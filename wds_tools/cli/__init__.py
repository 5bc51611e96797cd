"""The command line: one file a subcommand, one for all of `convert`; parse -> one config -> one function."""
