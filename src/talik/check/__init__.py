"""`talik check`: finds problems of a data set before a training."""
