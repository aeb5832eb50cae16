"""The command line: one file per command, arguments in, table out, no logic."""
