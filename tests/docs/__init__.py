"""What the pages under docs/ show runs as it stands."""
