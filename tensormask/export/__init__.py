"""The model as one graph in a file, and its use without PyTorch (`runtime`)."""
