"""`talik check`: finds problems of a data set before it is trained on."""
