"""What encoder columns are, where they lie, how many there are, and which rows see them."""
