"""Networks as people have them, made smaller by the operators, against networks that were built smaller."""
