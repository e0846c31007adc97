"""`talik check`: everything about a data set before an hour is spent on it."""
