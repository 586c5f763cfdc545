"""SuperServe: deadline-aware inference serving; the part that applications embed."""
