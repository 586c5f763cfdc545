"""What each row of the table of `make bench` measures."""
