"""What can be wrong with a data set: checks of its entries, and how issues are counted."""
