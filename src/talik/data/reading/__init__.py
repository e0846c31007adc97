"""Files and data sets of hubs -> rows."""
