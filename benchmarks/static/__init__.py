"""What compilers make of every kernel here, and what it must move, without a GPU."""
