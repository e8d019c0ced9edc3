"""Draw instances, image grids, and the views of 4D tensors."""
