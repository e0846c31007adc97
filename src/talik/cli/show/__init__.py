"""Everything that the command line prints."""
